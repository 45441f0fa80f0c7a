"""Reference: the packed weight decoded at every call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.masks import pack_bits, put_kept, raw, take_kept, unpack_bits
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight, dequantize


@BACKENDS.register("reference")
@dataclass(frozen=True)
class Reference:
    """Kept values and one bit a weight, decoded at every call: any pattern, device and dtype; small, exact and slow."""

    rank: ClassVar[int] = -1
    rounds_up_to: ClassVar[float] = 0

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse unless asked for by name."""
        return None if wanted else "decodes the whole weight at every call, which is slower than dense"

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """``values`` (kept,), in the weight's dtype, and ``bitmask`` (out, ceil(in / 8)) uint8.

        Of a quantised weight the values are its codes, in 8 bits each; ``scales`` (out, groups) are float32, seen as
        integers so that a cast of the module leaves them alone, and ``group`` is one number.
        """
        if not isinstance(weight, QuantizedWeight):
            return {"values": take_kept(weight, keep), "bitmask": pack_bits(keep)}
        scales, group = raw(weight.scales.contiguous()), torch.tensor(weight.group)
        return {"values": take_kept(weight.codes, keep), "bitmask": pack_bits(keep), "scales": scales, "group": group}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight; a quantised one in float32."""
        weight = put_kept(packed["values"], unpack_bits(packed["bitmask"], columns))
        if "scales" not in packed:
            return weight
        return dequantize(weight, packed["scales"].view(torch.float32), int(packed["group"]))

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). An 8-bit weight is widened to the dtype of ``x``, which is exact.

        A quantised weight is multiplied in float32 and the result rounded to the dtype of ``x``.
        """
        weight = self.unpack(packed, x.shape[-1])
        if "scales" in packed:
            return functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
        return functional.linear(x, weight.to(x.dtype) if weight.dtype.itemsize == 1 else weight, bias)
