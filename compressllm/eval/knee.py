"""Where a curve of loss against sparsity leaves the flat."""

from __future__ import annotations

from collections.abc import Sequence


def last_within(sparsities: Sequence[float], values: Sequence[float], dense: float, rise: float) -> int:
    """Index of the largest sparsity whose value is at most ``(1 + rise)`` times the dense one's.

    Args:
        sparsities: In any order; the dense point is among them.
        values: Loss or perplexity at each, all positive.
        rise: Relative rise that is let pass, 0.01 for 1 %.

    Source: the essential sparsity of Jaiswal et al., arXiv 2306.03805, who let pass 1 %.
    """
    within = [index for index, value in enumerate(values) if value <= dense * (1 + rise)]
    return max(within, key=lambda index: sparsities[index])


def farthest_from_chord(sparsities: Sequence[float], values: Sequence[float]) -> int | None:
    """Index of the point farthest below the straight line from the first to the last, or None if none is below.

    Neither axis's unit changes which point that is.

    Args:
        sparsities: Ascending.
        values: Loss at each.

    Source: the knee of Satopaa et al., Finding a "Kneedle" in a Haystack, ICDCSW 2011, without its smoothing.
    """
    if len(sparsities) < 3 or sparsities[-1] == sparsities[0]:
        return None
    slope = (values[-1] - values[0]) / (sparsities[-1] - sparsities[0])
    below = [values[0] + slope * (s - sparsities[0]) - value for s, value in zip(sparsities, values, strict=True)]
    farthest = max(range(1, len(below) - 1), key=below.__getitem__)
    return farthest if below[farthest] > 1e-9 * max(map(abs, values)) else None
