"""OWL: blocks with more outliers keep more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from compressllm.core.protocols import ALLOCATORS, Allocation, DenseLinear, DensePass
from compressllm.core.stats import Need

# No block is removed whole, unless more than this is asked of all of them.
_MOST: Final = 0.99


@ALLOCATORS.register("owl")
@dataclass(frozen=True)
class OWL:
    """Remove less from blocks with more outliers among their Wanda scores.

    o_b = share of a block's scores |W_ij| * rms(X_j) that exceed ``threshold`` times their mean
    s_b = s + mean(t) - t_b,  t_b = 2 * spread * (o_b - min o) / (max o - min o)

    The outliers are counted on the dense model, in one pass before anything is pruned. All linears of a block share
    its sparsity. Where no block stands out, the allocation is uniform.

    Args:
        threshold: How many times the mean a score must be to count as an outlier; the paper's M.
        spread: Half of the difference between the sparsest and the densest block; the paper's lambda.

    Source: Yin et al., Outlier Weighed Layerwise Sparsity, arXiv 2310.05175, section 3. Departures: the mean over
        blocks is weighted by their size, so that the total is what was asked also where blocks differ; sparsities
        stay in [0, 0.99], what that cuts off being spread over the other blocks.
    """

    threshold: float = 5.0
    spread: float = 0.08
    needs: ClassVar[frozenset[Need]] = frozenset({"sqnorm"})

    def __post_init__(self) -> None:
        if not self.threshold > 0 or not math.isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold:g} is no multiple of a mean; give a number above 0, such as 5")
        if not 0 <= self.spread <= 0.5:
            raise ValueError(f"spread={self.spread:g} is outside 0 to 0.5; small ones do best, such as 0.08")

    def allocate(self, dense: DensePass, sizes: Mapping[str, int], sparsity: float) -> Allocation:
        """One pass with statistics; the notes hold each block's share of outliers and its sparsity."""
        outliers: dict[str, float] = {}
        members: dict[str, list[str]] = {}
        for block, linears in dense():
            outliers[block], members[block] = self.outlier_share(linears), list(linears)
        weights = [sum(sizes[name] for name in names) for names in members.values()]
        shares = spread_around(sparsity, list(outliers.values()), weights, self.spread)
        of_block = dict(zip(members, shares, strict=True))
        return Allocation(
            {name: of_block[block] for block, names in members.items() for name in names},
            {"outlier_share": outliers, "block_sparsity": of_block},
        )

    def outlier_share(self, linears: Mapping[str, DenseLinear]) -> float:
        """Fraction of all of a block's scores that exceed ``threshold`` times their mean, 0 to 1.

        Scores are made twice, one linear at a time, so that a block's are never in memory together.
        """
        count = sum(linear.read().numel() for linear in linears.values())
        mean = math.fsum(float(_scores(one).sum(dtype=torch.float64)) for one in linears.values()) / count
        return sum(int((_scores(one) > self.threshold * mean).sum()) for one in linears.values()) / count


def _scores(linear: DenseLinear) -> Tensor:
    """Wanda's scores of one linear: (out, in) * (in,)."""
    return linear.read().abs() * linear.stats.need("sqnorm").sqrt()


def spread_around(sparsity: float, outliers: list[float], weights: list[int], spread: float) -> list[float]:
    """Sparsities whose mean under ``weights`` is ``sparsity``, lower where there are more outliers.

    Before clipping to [0, 0.99] their range is twice ``spread``; the mean holds after it too.
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    kept_more = [2 * spread * (one - low) / (high - low) for one in outliers]
    most = max(_MOST, sparsity)
    total = sum(weights)

    def shifted(shift: float) -> list[float]:
        return [min(max(shift - more, 0.0), most) for more in kept_more]

    shift = sparsity + math.fsum(w * more for w, more in zip(weights, kept_more, strict=True)) / total
    if all(0.0 <= shift - more <= most for more in kept_more):
        return shifted(shift)
    below, above = 0.0, most + 2 * spread  # at these all blocks are at 0, or all at the most
    for _ in range(100):  # halved down to a float's last bit
        shift = (below + above) / 2
        mean = math.fsum(w * one for w, one in zip(weights, shifted(shift), strict=True)) / total
        below, above = (shift, above) if mean < sparsity else (below, shift)
    return shifted(above)
