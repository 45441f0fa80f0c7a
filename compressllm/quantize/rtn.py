"""RTN: every weight to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressllm.core.protocols import QUANTIZERS, Quantized
from compressllm.core.quantized import round_to_nearest
from compressllm.core.scheme import Scheme
from compressllm.core.stats import InputStats, Need


@QUANTIZERS.register("rtn")
@dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest code; needs no text."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def quantize(self, weight: Tensor, keep: Tensor, stats: InputStats, scheme: Scheme) -> Quantized:
        """The largest kept weight of each group sets its scale. Raises FormatError if that is too large."""
        return Quantized(round_to_nearest(weight, keep, scheme))
