"""Reference: the packed weight decoded at every call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from compressllm.core.masks import pack_bits, put_kept, take_kept, unpack_bits
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS


@BACKENDS.register("reference")
@dataclass(frozen=True)
class Reference:
    """Kept values and one bit a weight, decoded at every call: any pattern, device and dtype; small, exact and slow."""

    rank: ClassVar[int] = -1

    def refuses(self, weight: Tensor, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse unless asked for by name."""
        return None if wanted else "decodes the whole weight at every call, which is slower than dense"

    def pack(self, weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """``values`` (kept,), in the weight's dtype, and ``bitmask`` (out, ceil(in / 8)) uint8."""
        return {"values": take_kept(weight, keep), "bitmask": pack_bits(keep)}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight."""
        return put_kept(packed["values"], unpack_bits(packed["bitmask"], columns))

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). An 8-bit weight is widened to the dtype of ``x``, which is exact."""
        weight = self.unpack(packed, x.shape[-1])
        return functional.linear(x, weight.to(x.dtype) if weight.dtype.itemsize == 1 else weight, bias)
