"""How much of a difference in perplexity is the text's chance: a paired bootstrap over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

_RESAMPLES: Final = 10_000
_DRAWS: Final = 1 << 22  # window numbers in memory at one time


class Rise(NamedTuple):
    """Relative rise in perplexity, negative if it fell.

    Args:
        value: Over the windows that were measured.
        low: With the confidence asked for, the rise over all such text is at least this.
        high: And, with the same confidence, at most this.
    """

    value: float
    low: float
    high: float


def paired_rise(before: Sequence[float], after: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Rise:
    """The rise from one model's windows to another's, and bounds on it; the same every time.

    Both models are scored on the same windows, so what makes a window hard falls out of the difference. Windows are
    drawn again with replacement; of the rises, ``exp(mean difference) - 1``, each bound is the quantile that leaves
    ``1 - confidence`` beyond it. The bounds say nothing of what another seed of calibration would have given.

    Args:
        before: Mean cross entropy of each window, in nats.
        after: Of the same windows, in the same order.
        confidence: Of each bound on its own, above 0.5.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, the percentile interval; Koehn, Statistical
        Significance Tests for Machine Translation Evaluation, EMNLP 2004, for its paired form.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    count = len(difference)
    draw = np.random.default_rng(seed)
    rows = max(1, _DRAWS // count)
    means = np.concatenate(
        [
            difference[draw.integers(count, size=(min(rows, _RESAMPLES - start), count))].mean(axis=1)
            for start in range(0, _RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [1.0 - confidence, confidence])
    return Rise(_rise(math.fsum(difference) / count), _rise(float(low)), _rise(float(high)))


def _rise(nats: float) -> float:
    return math.expm1(nats) if nats < 700 else math.inf
