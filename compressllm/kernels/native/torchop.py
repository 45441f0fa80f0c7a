"""Native kernels as torch operators, which torch.compile traces and calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from compressllm.kernels.native.library import Kernel, Library, library

#: (x, blocks, bias or None, rows) -> (..., rows)
Operator = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]

# Not torch.library.custom_op: its checks take longer at every call than a small linear does.
_library: Any = torch.library.Library("compressllm", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_linear(format: str, wide: str | None = None, many: int = 0) -> Operator:
    """Define ``torch.ops.compressllm.{format}_linear``, y = x W^T + b for blocks of that format.

    x and y are float32 or bfloat16; float16 is computed as float32. Has no gradient.

    Args:
        wide: A format of the same blocks, whose kernel is taken where it has one above ``scalar``, for bfloat16 inputs
            of ``many`` tokens or more.

    Returns: What to call: it goes through the operator while torch traces, and past torch's dispatcher, which takes
        longer than a small linear, otherwise.
    """
    name = f"{format}_linear"
    _library.define(f"{name}(Tensor x, Tensor blocks, Tensor? bias, int rows) -> Tensor")

    @functools.cache  # reads the environment once, not at every call
    def found() -> tuple[Library, Kernel, Kernel | None]:
        loaded = library()
        other = loaded.kernel(wide) if wide else None
        return loaded, loaded.kernel(format), other if other and other.isa != "scalar" else None

    def compute(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        loaded, kernel, other = found()
        if other and x.dtype == torch.bfloat16 and x.numel() >= many * x.shape[-1]:
            return loaded.linear(other, x, blocks, bias, rows)
        if x.dtype == torch.float16:
            return loaded.linear(kernel, x.float(), blocks, bias, rows).to(x.dtype)
        return loaded.linear(kernel, x, blocks, bias, rows)

    def shape(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows))

    _library.impl(name, compute, "CPU")
    torch.library.register_fake(f"compressllm::{name}", shape, lib=_library)
    operator = cast(Operator, getattr(torch.ops.compressllm, name).default)

    def linear(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
            return operator(x, blocks, bias, rows)
        return compute(x, blocks, bias, rows)

    return linear
