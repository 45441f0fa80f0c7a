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
from compressllm.kernels.native import bf16, integer
from compressllm.kernels.native.library import Kernel, library, unavailable


@BACKENDS.register("native")
@dataclass(frozen=True)
class Native:
    """2:4 on CPUs by C kernels that read only what is kept: bf16, int8 or int4 weights, bf16 or float32 inputs.

    Where the weights are integers, the inputs of each token are rounded to int8, with a scale for every 32 of them:
    an error of half a percent where inputs are normally distributed, of more beside an outlier. ``native-exact`` does
    not round them.

    Where the processor has AMX, bfloat16 inputs of many tokens, from 4 on beside bf16 weights and from 9 on beside
    integers, are multiplied as they are. Weights are expanded for it while they lie in a cache; integers times their
    scales are rounded to bfloat16, which is what a dense bfloat16 linear has.

    Sums are float32 and rounded once; they do not depend on the number of threads. An infinite or NaN input makes NaN
    or infinite those outputs whose rows keep its column, where a dense product, and that for many tokens, makes NaN all
    of them. A group of four that keeps fewer than two weights may keep a zero in its stead, at any column of the group.
    """

    rank: ClassVar[int] = 10
    exact: ClassVar[bool] = False

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse other dtypes, devices and patterns, and machines without a C compiler."""
        if not isinstance(weight, QuantizedWeight) and not _held_by_bfloat16(weight):
            more = " of more digits" if weight.dtype == torch.float32 else ""
            return f"its weights are torch.bfloat16 or quantised, not {weight.dtype}{more}"
        if weight.device.type != "cpu":
            return f"runs on CPUs, not on {weight.device.type}"
        if not _within_2_of_4(pattern):
            return f"runs what 2:4 can hold, not {pattern}"
        if weight.shape[1] % 4:
            return f"{weight.shape[1]} inputs are not a multiple of 4"
        if isinstance(weight, QuantizedWeight) and (reason := integer.refuses(weight)):
            return reason
        return unavailable()

    @property
    def rounds_up_to(self) -> float:
        """Inputs in bfloat16 of more tokens than so many are not rounded, where there is a matrix unit for them."""
        return 0 if self.exact else integer.rounds_up_to()

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """``blocks``, see `native.bf16.pack` and `native.integer.pack`; ``like`` (out, 0): the rows and the dtype."""
        if isinstance(weight, QuantizedWeight):
            blocks = integer.pack(weight, keep)
        else:
            blocks = bf16.pack(weight.bfloat16(), keep)
        return {"blocks": blocks, "like": torch.empty(weight.shape[0], 0, dtype=weight.dtype)}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight; a quantised one in float32."""
        like = packed["like"]
        if _quantized(packed):
            return integer.unpack(packed["blocks"], like.shape[0], columns)
        return bf16.unpack(packed["blocks"], like.shape[0], columns).to(like.dtype)

    def kernel(self, packed: Mapping[str, Tensor]) -> Kernel:
        """What computes a product with few tokens, for kernels that call it."""
        format = integer.format_of(packed["blocks"], self.exact) if _quantized(packed) else "bf16"
        return library().kernel(format)

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). Where a gradient is wanted, the weight is unpacked and torch computes it."""
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return functional.linear(x, self.unpack(packed, x.shape[-1]).to(x.dtype), bias)
        if _quantized(packed):
            return integer.linear(x, packed["blocks"], bias, packed["like"].shape[0], self.exact)
        return bf16.linear(x, packed["blocks"], bias, packed["like"].shape[0])


@BACKENDS.register("native-exact")
@dataclass(frozen=True)
class NativeExact(Native):
    """Quantised 2:4 on CPUs by C kernels that multiply the inputs as they are, about half as fast as ``native``.

    With many tokens, from 6 on, where the processor has AMX, it is the same as ``native``.
    """

    rank: ClassVar[int] = 9
    exact: ClassVar[bool] = True

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse what ``native`` computes without rounding, too."""
        if not isinstance(weight, QuantizedWeight):
            return "is for quantised weights; of others native rounds no inputs"
        return super().refuses(weight, pattern, wanted)


def _quantized(packed: Mapping[str, Tensor]) -> bool:
    return packed["blocks"].dtype == torch.uint8


def _held_by_bfloat16(weight: Tensor) -> bool:
    """Whether it is bfloat16, or float32 with no other values, as a weight has that was stored in bfloat16."""
    if weight.dtype == torch.float32:
        return torch.equal(weight, weight.bfloat16().float())
    return weight.dtype == torch.bfloat16


def _within_2_of_4(pattern: SparsityPattern) -> bool:
    if not isinstance(pattern, NM):
        return False
    return (pattern.m % 4 == 0 and pattern.n <= 2) or (pattern.n, pattern.m) == (1, 2)
