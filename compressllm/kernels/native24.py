"""Native: 2:4 on CPUs by kernels in C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.pattern import NM, SparsityPattern
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight
from compressllm.kernels.native import bf16
from compressllm.kernels.native.library import unavailable


@BACKENDS.register("native")
@dataclass(frozen=True)
class Native:
    """2:4 on CPUs by C kernels that read only what is kept: bf16 weights, bf16 or float32 inputs.

    Sums are float32 and rounded once; they do not depend on the number of threads. An infinite or NaN input makes NaN
    or infinite those outputs whose rows keep its column, where a dense product makes NaN all of them. A group of four
    that keeps fewer than two weights may keep a zero in its stead, at any column of the group.
    """

    rank: ClassVar[int] = 10

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse other dtypes, devices and patterns, and machines without a C compiler."""
        if isinstance(weight, QuantizedWeight):
            return "its weights are not quantised"
        if weight.dtype != torch.bfloat16 and not _held_by_bfloat16(weight):
            return f"its weights are torch.bfloat16, and this {weight.dtype} one is not what bfloat16 can hold"
        if weight.device.type != "cpu":
            return f"runs on CPUs, not on {weight.device.type}"
        if not _within_2_of_4(pattern):
            return f"runs what 2:4 can hold, not {pattern}"
        if weight.shape[1] % 4:
            return f"{weight.shape[1]} inputs are not a multiple of 4"
        return unavailable()

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """``blocks``, see `native.bf16.pack`, and ``like`` (out, 0): the rows, without padding, and the dtype."""
        assert isinstance(weight, Tensor)
        return {"blocks": bf16.pack(weight.bfloat16(), keep), "like": weight.new_empty(weight.shape[0], 0)}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight."""
        like = packed["like"]
        return bf16.unpack(packed["blocks"], like.shape[0], columns).to(like.dtype)

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). Where a gradient is wanted, the weight is unpacked and torch computes it."""
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return functional.linear(x, self.unpack(packed, x.shape[-1]).to(x.dtype), bias)
        return bf16.linear(x, packed["blocks"], bias, packed["like"].shape[0])


def _held_by_bfloat16(weight: Tensor) -> bool:
    """Whether a float32 weight has only values of bfloat16, as one has that was stored in it."""
    return weight.dtype == torch.float32 and torch.equal(weight, weight.bfloat16().float())


def _within_2_of_4(pattern: SparsityPattern) -> bool:
    if not isinstance(pattern, NM):
        return False
    return (pattern.m % 4 == 0 and pattern.n <= 2) or (pattern.n, pattern.m) == (1, 2)
