"""Native kernels as torch operators, which torch.compile traces and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from compressllm.kernels.native.library import library

#: (x, blocks, bias or None, rows) -> (..., rows)
Operator = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]

# Not torch.library.custom_op: its checks take longer at every call than a small linear does.
_library: Any = torch.library.Library("compressllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_COMPUTED = (torch.float32, torch.bfloat16)


def define_linear(format: str) -> Operator:
    """Define ``torch.ops.compressllm.{format}_linear``, y = x W^T + b for blocks of that format.

    x and y are float32 or bfloat16; float16 is computed as float32. Has no gradient.
    """
    name = f"{format}_linear"
    _library.define(f"{name}(Tensor x, Tensor blocks, Tensor? bias, int rows) -> Tensor")

    def compute(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        if x.dtype not in _COMPUTED:
            if x.dtype != torch.float16:
                raise RuntimeError(f"{name} takes float32, bfloat16 or float16 inputs, not {x.dtype}")
            return compute(x.float(), blocks, bias, rows).to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        loaded = library()
        return loaded.linear(loaded.kernel(format), x, blocks, bias, rows)

    def shape(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows))

    _library.impl(name, compute, "CPU")
    torch.library.register_fake(f"compressllm::{name}", shape, lib=_library)
    return cast(Operator, getattr(torch.ops.compressllm, name).default)
