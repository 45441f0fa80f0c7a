"""A budget of records over clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence


def share_budget(budget: int, weights: Sequence[float], sizes: Sequence[int], floor: float) -> list[int]:
    """How many records to choose from each cluster: in proportion to its weight, and exactly ``budget`` together.

    A cluster gets at least ``floor`` of the budget and at most all its records; what one cannot take is spread over
    the others by their weights. Fractions are rounded by largest remainder, the first cluster winning a tie.

    Args:
        budget: At most the sum of ``sizes``.
        weights: Not negative; all zero counts as all equal.
        sizes: Records in each cluster, at least one.
        floor: Fraction of the budget.
    """
    least = [min(size, math.floor(min(floor, 1 / len(sizes)) * budget)) for size in sizes]
    parts: list[float] = [0.0] * len(sizes)
    free = set(range(len(sizes)))
    left = float(budget)
    positive = any(weights)
    while free:
        total = math.fsum(weights[one] if positive else sizes[one] for one in free)
        for one in free:
            weight = weights[one] if positive else sizes[one]
            parts[one] = left * weight / total if total else left / len(free)
        # Those that can take no more first: once they are fixed the others get more, and need a floor less often.
        bound = {one: float(sizes[one]) for one in free if parts[one] > sizes[one]}
        bound = bound or {one: float(least[one]) for one in free if parts[one] < least[one]}
        if not bound:
            break
        for one, count in bound.items():
            parts[one] = count
        free -= bound.keys()
        left = budget - math.fsum(part for one, part in enumerate(parts) if one not in free)
    return _whole(parts, budget, sizes)


def _whole(parts: Sequence[float], budget: int, sizes: Sequence[int]) -> list[int]:
    counts = [math.floor(part + 1e-9) for part in parts]
    for one in sorted(range(len(parts)), key=lambda one: (counts[one] - parts[one], one)):
        if sum(counts) < budget and counts[one] < sizes[one]:
            counts[one] += 1
    return counts
