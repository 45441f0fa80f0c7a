"""Magnitude pruning: the baseline that looks at no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressllm.core.pattern import Group
from compressllm.core.protocols import PRUNERS
from compressllm.core.stats import InputStats
from compressllm.prune.criterion import Criterion


@PRUNERS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Criterion):
    """Keep the largest weights: the baseline that looks at no data.

    score_ij = |W_ij|

    Unstructured, all weights of a matrix compete, as in the published baselines; ``0.5/row`` does better.

    Source: Han et al., Learning both Weights and Connections, arXiv 1506.02626.
    """

    group: ClassVar[Group] = "layer"

    def score(self, weight: Tensor, stats: InputStats) -> Tensor:
        """|W|."""
        return weight.abs()
