"""How much of a difference in perplexity is the text's chance: a paired bootstrap over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
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

    Both models are scored on the same windows, so what makes a window hard falls out of the difference. Runs of windows
    that follow each other, as many as the cube root of all, are drawn again with replacement, the end followed by the
    beginning: neighbours are of one document and alike. Of the rises, ``exp(mean difference) - 1``, each bound is the
    quantile that leaves ``1 - confidence`` beyond it, or less where runs are few: resamples of k runs vary by
    ``(k - 1) / k`` of what their means do, and a variance taken from k wants Student's distribution. The bounds say
    nothing of what another seed of calibration would have given.

    Args:
        before: Mean cross entropy of each window, in nats.
        after: Of the same windows, in the same order.
        confidence: Of each bound on its own, above 0.5.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, the percentile interval; Koehn, Statistical
        Significance Tests for Machine Translation Evaluation, EMNLP 2004, for its paired form; Politis and Romano, A
        Circular Block-Resampling Procedure for Stationary Data, 1992; Hesterberg, What Teachers Should Know about the
        Bootstrap, 2015, for the expanded percentiles.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    count = len(difference)
    length = round(count ** (1 / 3))
    drawn = -(-count // length)  # runs of a resample
    runs = np.stack([np.roll(difference, -at) for at in range(length)]).mean(axis=0)  # of `length` from each window on
    draw = np.random.default_rng(seed)
    rows = max(1, _DRAWS // drawn)
    means = np.concatenate(
        [
            runs[draw.integers(count, size=(min(rows, _RESAMPLES - start), drawn))].mean(axis=1)
            for start in range(0, _RESAMPLES, rows)
        ]
    )
    beyond = _expanded(1.0 - confidence, round(count / length))
    low, high = np.quantile(means, [beyond, 1.0 - beyond])
    return Rise(_rise(math.fsum(difference) / count), _rise(float(low)), _rise(float(high)))


def _expanded(beyond: float, count: int) -> float:
    """The share of resamples of so many draws to leave beyond a bound, so that ``beyond`` of all means are."""
    if count < 2:
        return beyond
    return NormalDist().cdf(math.sqrt(count / (count - 1)) * student_quantile(beyond, count - 1))


def student_quantile(share: float, freedom: float) -> float:
    """The value that a share of Student's distribution lies below, to 1 % from 3 degrees of freedom and shares of 0.01.

    Source: Abramowitz and Stegun, 26.7.5.
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _rise(nats: float) -> float:
    return math.expm1(nats) if nats < 700 else math.inf
