"""Wanda: weights times the size of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressllm.core.protocols import PRUNERS
from compressllm.core.stats import InputStats, Need
from compressllm.prune.criterion import Criterion


@PRUNERS.register("wanda")
@dataclass(frozen=True)
class Wanda(Criterion):
    """Keep weights that are large or act on large inputs; no weight is changed.

    score_ij = |W_ij| * ||X_j||_2

    The norm is taken as a root mean square over tokens; a constant factor leaves every ranking as it is.

    Source: Sun et al., A Simple and Effective Pruning Approach for LLMs, arXiv 2306.11695, eq. 1.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"sqnorm"})

    def score(self, weight: Tensor, stats: InputStats) -> Tensor:
        """|W| * rms(X): (out, in) * (in,)."""
        return weight.abs() * stats.need("sqnorm").sqrt()
