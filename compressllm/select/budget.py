"""A budget of records over clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

# Beside a cluster of any weight one without counts for nothing, but it is not left empty where the others are full.
_NOTHING: Final = 1e-9


def share_budget(budget: int, weights: Sequence[float], sizes: Sequence[int], floor: float) -> list[int]:
    """How many records to choose from each cluster: in proportion to its weight, and exactly ``budget`` together.

    A cluster gets at least ``floor`` of the budget and at most all its records; what one cannot take is spread over
    the others by their weights. Fractions are rounded by largest remainder, the first cluster winning a tie.

    Args:
        budget: At most the sum of ``sizes``.
        weights: Not negative; all zero counts as all records alike.
        sizes: Records in each cluster, at least one.
        floor: Fraction of the budget; of more than an equal share, an equal share.
    """
    least = [min(size, math.floor(min(floor, 1 / len(sizes)) * budget)) for size in sizes]
    some = max(weights) * _NOTHING or 1.0
    positive = [weight or some * size / sum(sizes) for weight, size in zip(weights, sizes, strict=True)]

    def parts(scale: float) -> list[float]:
        bounds = zip(positive, least, sizes, strict=True)
        return [min(max(scale * weight, low), high) for weight, low, high in bounds]

    lower, upper = 0.0, max(size / weight for size, weight in zip(sizes, positive, strict=True))
    for _ in range(200):  # more halvings than a float has bits
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if math.fsum(parts(middle)) < budget else (lower, middle)
    wanted = parts(upper)
    counts = [math.floor(part + 1e-6) for part in wanted]
    by_remainder = sorted(range(len(sizes)), key=lambda one: (counts[one] - wanted[one], one))
    for one in by_remainder[: budget - sum(counts)]:
        counts[one] += 1
    return counts
