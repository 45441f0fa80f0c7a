"""Products with some neurons of a dense MLP only: rows of gate and up, columns of down, chosen at run time.

A neuron that is left out is not read: at few tokens, time falls with the number of those that are. On a CPU with a C
compiler, float32 and bfloat16 go through C kernels; everything else through torch, which copies what is chosen first.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.kernels.native.library import best_function

_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as c/kernel.h numbers them
_FEW_TOKENS = 8  # with more, a product of matrices reads the weights less often

_library: Any = torch.library.Library("compressllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("active_rows(Tensor x, Tensor weight, Tensor index) -> Tensor")
_library.define("active_columns(Tensor x, Tensor weight_t, Tensor index) -> Tensor")


def active_rows(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """``x W[index]^T``, as of gate and up: the outputs of the chosen neurons.

    Args:
        x: (..., in).
        weight: (neurons, in), dense, of the dtype of ``x``.
        index: (active,) int32.

    Returns: (..., active), of the dtype of ``x``; sums are float32.

    Raises: IndexError if an index is out of range; RuntimeError if shapes or dtypes do not fit.
    """
    return torch.ops.compressllm.active_rows(x, weight, index)  # type: ignore[no-any-return]


def active_columns(x: Tensor, weight_t: Tensor, index: Tensor) -> Tensor:
    """``x W[:, index]^T``, as of down: what the chosen neurons put out.

    Args:
        x: (..., active): the activations of the chosen neurons.
        weight_t: (neurons, out), the transpose of down's weight, so that what is read of it is contiguous; of the
            dtype of ``x``.
        index: (active,) int32.

    Returns: (..., out), of the dtype of ``x``; sums are float32.

    Raises: IndexError if an index is out of range; RuntimeError if shapes or dtypes do not fit.
    """
    return torch.ops.compressllm.active_columns(x, weight_t, index)  # type: ignore[no-any-return]


def _rows_by_torch(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return functional.linear(x, weight.index_select(0, index))


def _columns_by_torch(x: Tensor, weight_t: Tensor, index: Tensor) -> Tensor:
    return x @ weight_t.index_select(0, index)


def _rows_on_cpu(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    kernel = _kernel("active_rows")
    if kernel is None or not _suits(x, weight):
        return _rows_by_torch(x, weight, index)
    _check(x, weight, index, x.shape[-1] == weight.shape[1])
    y = x.new_empty((*x.shape[:-1], len(index)), dtype=torch.float32)
    return _call(kernel, y, x, weight, index)


def _columns_on_cpu(x: Tensor, weight_t: Tensor, index: Tensor) -> Tensor:
    kernel = _kernel("active_columns")
    if kernel is None or not _suits(x, weight_t):
        return _columns_by_torch(x, weight_t, index)
    _check(x, weight_t, index, x.shape[-1] == len(index))
    y = x.new_zeros((*x.shape[:-1], weight_t.shape[1]), dtype=torch.float32)
    return _call(kernel, y, x, weight_t, index)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these: the dtype, weights that lie row by row, few tokens."""
    tokens = x.numel() // max(1, x.shape[-1])
    return x.dtype in _TYPES and weight.is_contiguous() and tokens <= _FEW_TOKENS


def _check(x: Tensor, weight: Tensor, index: Tensor, fits: bool) -> None:
    if x.dtype != weight.dtype or index.dtype != torch.int32 or index.dim() != 1 or not fits:
        raise RuntimeError(
            f"inputs {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)} and index {index.dtype} "
            f"{tuple(index.shape)} do not fit; the index is int32, and both others have one dtype"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < weight.shape[0]:
        raise IndexError(f"indices {int(index.min())} to {int(index.max())} into {weight.shape[0]} neurons")


def _call(kernel: Any, y: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    wide, index = x.float().contiguous(), index.contiguous()
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (y, wide, weight, index)]
    sizes = (len(index), weight.shape[1], x.numel() // max(1, x.shape[-1]))
    kernel(*addresses, *map(ctypes.c_int64, sizes), ctypes.c_int(_TYPES[x.dtype]))
    return y.to(x.dtype)


def c_function(name: str) -> int | None:
    """Address of ``active_rows`` or ``active_columns``, see c/active.h, for kernels that call it; None without one."""
    kernel = _kernel(name)
    return None if kernel is None else ctypes.cast(kernel, ctypes.c_void_p).value


@functools.cache
def _kernel(name: str) -> Any:
    """The C function for the highest instruction set that has one and computes what torch does, or None."""
    return best_function(name, functools.partial(_agrees, name))


def _agrees(name: str, kernel: Any) -> bool:
    random = torch.Generator().manual_seed(0)
    index = torch.randperm(40, generator=random)[:23].int()
    right_of: Callable[..., Tensor] = _rows_by_torch if name == "active_rows" else _columns_by_torch
    for dtype in _TYPES:
        weight = torch.randn(40, 77, generator=random).to(dtype)
        x = torch.randn(3, 77 if name == "active_rows" else 23, generator=random).to(dtype)
        right = right_of(x.float(), weight.float(), index)
        got = _call(kernel, torch.zeros_like(right), x, weight, index).float()
        if not (got - right).abs().max() <= 2 * torch.finfo(dtype).eps * right.abs().max():
            return False
    return True


def _fake_rows(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], index.shape[0]))


def _fake_columns(x: Tensor, weight_t: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


_library.impl("active_rows", _rows_by_torch, "CompositeExplicitAutograd")
_library.impl("active_columns", _columns_by_torch, "CompositeExplicitAutograd")
_library.impl("active_rows", _rows_on_cpu, "CPU")
_library.impl("active_columns", _columns_on_cpu, "CPU")
torch.library.register_fake("compressllm::active_rows", _fake_rows, lib=_library)
torch.library.register_fake("compressllm::active_columns", _fake_columns, lib=_library)
