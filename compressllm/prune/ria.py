"""RIA: relative importance and activations, a criterion that spares thin rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.pattern import Group
from compressllm.core.protocols import PRUNERS
from compressllm.core.stats import InputStats, Need
from compressllm.prune.criterion import Criterion


@PRUNERS.register("ria")
@dataclass(frozen=True)
class RIA(Criterion):
    """Keep weights that are a large share of their row and column and act on large inputs.

    score_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** power

    A weight in a thin row or column counts for more than its size, so that no channel is emptied. Unstructured, all
    weights of a matrix compete, as published. The norm is a root mean square over tokens; a constant factor leaves
    every ranking as it is.

    Args:
        power: How far the size of inputs counts; 0 leaves it out.

    Source: Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models,
    ICLR 2024.
    """

    power: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"sqnorm"})
    group: ClassVar[Group] = "layer"

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise ValueError(f"power {self.power} is negative; give 0 or more")

    def score(self, weight: Tensor, stats: InputStats) -> Tensor:
        """(|W| / column sums + |W| / row sums) * rms(X) ** power: (out, in) * (in,)."""
        size = weight.abs().contiguous()  # sums in one order, whatever the memory layout
        share = size / _divisor(size.sum(0)) + size / _divisor(size.sum(1, keepdim=True))
        return share * stats.need("sqnorm").sqrt() ** self.power


def _divisor(sums: Tensor) -> Tensor:
    """Sums to divide by; where one is 0, so are the weights in it, and so is their share."""
    return torch.where(sums > 0, sums, 1.0)
