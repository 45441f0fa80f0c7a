"""Native bitmask: unstructured sparsity on CPUs by kernels in C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight
from compressllm.kernels.native import bitmask
from compressllm.kernels.native.library import unavailable

_PAYS_FROM = 0.5  # sparsity at which reading a bit a weight and the kept ones beats reading all


@BACKENDS.register("native-bitmask")
@dataclass(frozen=True)
class NativeBitmask:
    """Any pattern on CPUs by C kernels that read a bit a weight and what is kept: bf16 weights, bf16 or float32 inputs.

    Sums are float32 and rounded once; they do not depend on the number of threads. An infinite or NaN input reaches the
    outputs of all rows, as in a dense product; without vector instructions, of those that keep its column.
    """

    rank: ClassVar[int] = -1  # expanding takes about as long as the bytes it saves: only a measurement chooses it
    rounds_up_to: ClassVar[float] = 0

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse other dtypes and devices, machines without a C compiler, and unless asked for what is too dense."""
        if isinstance(weight, QuantizedWeight) or weight.dtype != torch.bfloat16:
            kind = "quantised ones" if isinstance(weight, QuantizedWeight) else weight.dtype
            return f"its weights are torch.bfloat16, not {kind}"
        if weight.device.type != "cpu":
            return f"runs on CPUs, not on {weight.device.type}"
        if not wanted and pattern.sparsity < _PAYS_FROM:
            return f"saves bytes worth the work from a sparsity of {_PAYS_FROM} on, not at {pattern}"
        return unavailable()

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """``blocks``, see `native.bitmask.pack`; ``like`` (out, 0): the rows and the dtype."""
        if isinstance(weight, QuantizedWeight):
            raise TypeError("native-bitmask packs no quantised weights")
        return {"blocks": bitmask.pack(weight, keep), "like": weight.new_empty(weight.shape[0], 0)}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight."""
        like = packed["like"]
        return bitmask.unpack(packed["blocks"], like.shape[0], columns).to(like.dtype)

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). Where a gradient is wanted, the weight is unpacked and torch computes it."""
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return functional.linear(x, self.unpack(packed, x.shape[-1]).to(x.dtype), bias)
        return bitmask.linear(x, packed["blocks"], bias, packed["like"].shape[0])
