"""Pruners around another pruner: the first chooses a mask, and the refiner betters it or the weights under it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from compressllm.core.pattern import Group, SparsityPattern
from compressllm.core.protocols import Pruned, Pruner
from compressllm.core.stats import InputStats, Need


class Refiner(ABC):
    """A Pruner that starts from another pruner's mask, or from one that is given.

    A subclass is a frozen dataclass with a field ``init: Pruner``.
    """

    init: Pruner
    reads: ClassVar[frozenset[Need]]
    """Input statistics that refining itself reads."""

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics that it and its initial pruner read."""
        return self.reads | self.init.needs

    @property
    def group(self) -> Group:
        """The initial pruner's."""
        return self.init.group

    @abstractmethod
    def refine(self, weight: Tensor, keep: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Better an (out, in) bool mask of a dense (out, in) float32 weight, or the weights under it.

        Keeps the pattern and as many weights as ``keep`` does. Does not change its arguments.
        """

    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Refine the mask that the initial pruner chooses on the dense weight; its fallback is passed on."""
        start = self.init.prune(weight, stats, pattern)
        refined = self.refine(weight, start.keep, stats, pattern)
        fallbacks = [one.fallback for one in (start, refined) if one.fallback]
        return replace(refined, fallback="; ".join(fallbacks) or None)
