"""How much of a difference in accuracy is the items' chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple


class Drop(NamedTuple):
    """Fall in accuracy as a fraction, negative if it rose.

    Args:
        value: Over the items that were asked.
        low: With the confidence asked for, the drop over all such items is at least this.
        high: And, with the same confidence, at most this.
    """

    value: float
    low: float
    high: float


def paired_drop(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], confidence: float = 0.95) -> Drop:
    """The drop of the mean over tasks of the accuracy, and bounds on it, from the same items' scores.

    Only items that one model has right and the other wrong tell the two apart. With b of n lost and c gained, the drop
    is ``(b - c) / n``; for the bounds each count is taken half an item larger, and n two items, so that no difference
    has no variance, and few changed items do not count as certain.

    Args:
        before: For each task, 0 or 1 for each of its items.
        after: For the same items in the same order.
        confidence: Of each bound on its own, above 0.5.

    Source: Agresti and Min, Simple improved confidence intervals for comparing matched proportions, Statistics in
        Medicine 2005; here of a mean over tasks.
    """
    share = 1.0 / len(before)
    value = centre = variance = 0.0
    for one, other in zip(before, after, strict=True):
        count = len(one)
        lost = sum(a > b for a, b in zip(one, other, strict=True))
        gained = sum(a < b for a, b in zip(one, other, strict=True))
        drop = (lost - gained) / (count + 2)
        value += share * (lost - gained) / count
        centre += share * drop
        variance += share**2 * ((lost + gained + 1) / (count + 2) - drop**2) / (count + 2)
    return _bounded(value, centre, math.sqrt(variance), confidence)


def unpaired_drop(
    before: tuple[float, float | None], after: tuple[float, float | None], confidence: float = 0.95
) -> Drop:
    """The drop between two accuracies, each with its standard error if known, whose items' scores are not.

    Wider than `paired_drop`, as if the two had been asked different items.
    """
    value = before[0] - after[0]
    return _bounded(value, value, math.hypot(before[1] or 0.0, after[1] or 0.0), confidence)


def _bounded(value: float, centre: float, error: float, confidence: float) -> Drop:
    reach = NormalDist().inv_cdf(confidence) * error
    return Drop(value, centre - reach, centre + reach)
