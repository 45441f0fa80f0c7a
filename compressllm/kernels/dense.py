"""Dense: the weight itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight


@BACKENDS.register("dense")
@dataclass(frozen=True)
class Dense:
    """The weight itself, zeros and all, dequantised: runs wherever torch does, saves nothing."""

    rank: ClassVar[int] = 0
    rounds_up_to: ClassVar[float] = 0

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse what torch has no plain product for."""
        if weight.dtype.itemsize == 1:
            return f"torch multiplies no activations by a plain {weight.dtype} weight"
        return None

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """The weight; a quantised one in the dtype it computes in, which rounds it."""
        return {"weight": weight.dequantize() if isinstance(weight, QuantizedWeight) else weight}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The weight."""
        return packed["weight"]

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        return functional.linear(x, packed["weight"], bias)
