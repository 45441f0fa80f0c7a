"""Products of a few tokens with a dense weight, which is read once for all of them.

Libraries of matrix products are made for many tokens and for one: two to sixteen cost them, on a CPU, nearly as many
times one. Float32 and bfloat16 go through C kernels where there is a C compiler, all else through torch; so does
bfloat16 on CPUs with AMX, whose tiles torch fills with a few tokens as well.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.compute import has_tiles
from compressllm.kernels.native.library import best_function

_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as c/kernel.h numbers them
_MANY_TOKENS = 17  # from here on torch is as fast, or will be soon


def few_tokens(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as `torch.nn.functional.linear` has it; has no gradient where a kernel computes it.

    Args:
        x: (..., in), of any number of tokens; two to sixteen are what it is for.
        weight: (out, in), dense.
        bias: (out,) or None.

    Returns: (..., out), of the dtype of ``x``; sums are float32.
    """
    tokens = x.numel() // max(1, x.shape[-1])
    kernel = _kernel() if 1 < tokens < _MANY_TOKENS and x.device.type == "cpu" else None
    if (
        kernel is None
        or x.dtype not in _TYPES
        or x.dtype != weight.dtype
        or (x.dtype == torch.bfloat16 and has_tiles())
        or not weight.is_contiguous()
        or x.shape[-1] != weight.shape[1]
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        return functional.linear(x, weight, bias)
    y = _call(kernel, x, weight, tokens)
    return y + bias if bias is not None else y


def _call(kernel: Any, x: Tensor, weight: Tensor, tokens: int) -> Tensor:
    wide = x.float().contiguous()
    y = wide.new_empty((*x.shape[:-1], weight.shape[0]))
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (y, wide, weight)]
    sizes = (weight.shape[0], weight.shape[1], tokens)
    kernel(*addresses, *map(ctypes.c_int64, sizes), ctypes.c_int(_TYPES[weight.dtype]))
    return y.to(x.dtype)


@functools.cache
def _kernel() -> Any:
    """The C function for the highest instruction set that has one and computes what torch does, or None."""
    return best_function("few_tokens", _agrees)


def _agrees(kernel: Any) -> bool:
    random = torch.Generator().manual_seed(0)
    for dtype in _TYPES:
        weight, x = torch.randn(52, 77, generator=random).to(dtype), torch.randn(7, 77, generator=random).to(dtype)
        exact = x.double() @ weight.double().T
        # What rounding sums of 77 products at every step, and the result once, can do at most.
        allowed = 77 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
        allowed += torch.finfo(dtype).eps * exact.abs()
        if not ((_call(kernel, x, weight, 7).double() - exact).abs() <= allowed).all():
            return False
    return True
