"""One threshold on weight magnitude for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from compressllm.core.protocols import ALLOCATORS, Allocation, DensePass
from compressllm.core.stats import Need
from compressllm.prune.apportion import fraction_of

# A float32 without its sign has 31 bits, and sorts as the integer of its bits does. The first pass counts their upper
# 15, the second the lower 16 of those weights whose upper bits are the threshold's.
_LOW: Final = 16


@ALLOCATORS.register("global")
@dataclass(frozen=True)
class GlobalMagnitude:
    """Remove from each linear what lies under one magnitude threshold for the whole model.

    With ``magnitude`` and its group ``layer`` this is global magnitude pruning, exact to the weight: weights that
    equal the threshold are shared out among the linears in proportion to how many each has. The threshold is found
    in two passes over the weights, one linear in memory at a time.

    Source: Jaiswal et al., The Emergence of Essential Sparsity, arXiv 2306.03805.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    def allocate(self, dense: DensePass, sizes: Mapping[str, int], sparsity: float) -> Allocation:
        """Two passes over the weights; the notes hold the threshold."""
        remove = round(sparsity * sum(sizes.values()))
        upper = torch.zeros(1 << (31 - _LOW), dtype=torch.int64)
        for _, linears in dense():
            for linear in linears.values():
                upper += torch.bincount(_bits(linear.read()) >> _LOW, minlength=len(upper)).cpu()
        bucket, before = _reach(upper, remove)

        below: dict[str, int] = {}  # weights in lower buckets
        inside: dict[str, tuple[Tensor, Tensor]] = {}  # distinct lower bits in the bucket, and how often each occurs
        lower = torch.zeros(1 << _LOW, dtype=torch.int64)
        for _, linears in dense():
            for name, linear in linears.items():
                bits = _bits(linear.read())
                below[name] = int(((bits >> _LOW) < bucket).sum())
                rest = (bits[(bits >> _LOW) == bucket] & ((1 << _LOW) - 1)).cpu()
                inside[name] = values, counts = torch.unique(rest, return_counts=True)
                lower[values] += counts
        last, under = _reach(lower, remove - before)

        removed: dict[str, int] = {}
        tied, seen, given = int(lower[last]), 0, 0
        for name in sizes:
            values, counts = inside[name]
            seen += int(counts[values == last].sum())
            due = seen * (remove - before - under) // tied if tied else 0
            removed[name] = below[name] + int(counts[values < last].sum()) + due - given
            given = due
        threshold = torch.tensor((bucket << _LOW) | last, dtype=torch.int32).view(torch.float32)
        return Allocation(
            {name: fraction_of(removed[name], size) for name, size in sizes.items()},
            {"magnitude_threshold": float(threshold)},
        )


def _bits(weight: Tensor) -> Tensor:
    """Bits of each magnitude, as a flat int32 tensor that sorts as the magnitudes do."""
    return weight.abs().contiguous().view(torch.int32).flatten()


def _reach(histogram: Tensor, count: int) -> tuple[int, int]:
    """The first bin at which ``count`` items are reached, and how many lie in the bins before it."""
    sums = histogram.cumsum(0)
    at = int(torch.searchsorted(sums, count))
    at = min(at, len(sums) - 1)
    return at, int(sums[at] - histogram[at])
