"""RTN: every weight to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.protocols import QUANTIZERS, Quantized
from compressllm.core.quantized import QuantizedWeight, round_to_nearest
from compressllm.core.scheme import LARGEST, Scheme
from compressllm.core.stats import InputStats, Need


@QUANTIZERS.register("rtn")
@dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest code; needs no text.

    Args:
        fit: Try every code above half of the largest for the largest weight of a group, and take the one that leaves
            the least squared error. Finds the codes of weights that lie on a grid already, as joint pruning leaves
            them; of others it is a little closer than the largest code for the largest weight.
    """

    fit: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    def quantize(self, weight: Tensor, keep: Tensor, stats: InputStats, scheme: Scheme) -> Quantized:
        """The largest kept weight of each group sets its scale. Raises FormatError if that is too large."""
        made = round_to_nearest(weight, keep, scheme)
        return Quantized(_fitted(weight, keep, made) if self.fit and made.integer else made)


def _fitted(weight: Tensor, keep: Tensor, made: QuantizedWeight) -> QuantizedWeight:
    """The same weight by the best of all scales that give the largest weight of a group a code above half the largest.

    A smaller code would be no more than the double of one that is tried.
    """
    scheme, (out, columns) = made.scheme, weight.shape
    kept = weight.float().masked_fill(~keep, 0.0)
    padded = functional.pad(kept, (0, -columns % made.group)).view(out, -1, made.group)
    largest, top = LARGEST[made.bits], padded.abs().amax(-1)
    best = torch.full_like(made.scales, float("inf"))
    scales = made.scales.clone()
    for code in range(largest, largest // 2, -1):
        tried = scheme.rounded_scale(top / code)
        error = (scheme.code(padded, tried[..., None]) * tried[..., None] - padded).square().sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    codes = scheme.code(padded, scales[..., None]).view(out, -1)[:, :columns].to(scheme.dtype).contiguous()
    return replace(made, codes=codes, scales=scales)
