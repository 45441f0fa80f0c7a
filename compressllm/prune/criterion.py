"""Pruners that only score: what is kept keeps its value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.pattern import Group, SparsityPattern
from compressllm.core.protocols import Pruned
from compressllm.core.stats import InputStats, Need


class Criterion(ABC):
    """A Pruner that keeps the weights with the highest scores, as they are."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    group: ClassVar[Group] = "row"

    @abstractmethod
    def score(self, weight: Tensor, stats: InputStats) -> Tensor:
        """Score each weight of an (out, in) float32 matrix; higher stays."""

    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Keep the highest scores the pattern allows, and +0.0 elsewhere."""
        keep = pattern.keep(self.score(weight, stats))
        return Pruned(keep, torch.where(keep, weight, 0.0))
