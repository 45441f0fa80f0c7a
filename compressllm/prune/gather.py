"""Prune in an order of inputs that each linear has to itself, for kernels that gather their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.gathered import Gathered
from compressllm.core.pattern import NM, SparsityPattern
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.registry import build
from compressllm.core.stats import InputStats, Need
from compressllm.prune.config import GatherConfig
from compressllm.prune.criterion import Criterion
from compressllm.prune.exchange import find_order
from compressllm.prune.plan import first_match

Solve = Callable[[Tensor, InputStats, SparsityPattern], Pruned]


def solve_in_order(weight: Tensor, stats: InputStats, pattern: Gathered, solve: Solve) -> Pruned:
    """What ``solve`` makes of an (out, in) weight with its inputs in the pattern's order, put back as they came."""
    made = solve(pattern.ordered(weight), stats.in_order(pattern.places), pattern.base)
    return replace(made, keep=pattern.back(made.keep), weight=pattern.back(made.weight), pattern=pattern)


@dataclass(frozen=True)
class Gather:
    """Finds the order of a linear's inputs under which N:M keeps the most of a score, and prunes in it.

    Orders that `permute` makes cost nothing when the model runs, but many linears share them. This one is found for
    each linear by itself, with the same search, and is paid for: every call gathers its inputs.

    Args:
        config: What is counted, for how long is searched, and in which linears.
        seed: Of the search.
    """

    config: GatherConfig
    seed: int

    @property
    def criterion(self) -> Criterion:
        """What is counted."""
        return cast(Criterion, build(PRUNERS, self.config.score))

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics that it reads."""
        return self.criterion.needs

    def check(self, names: Iterable[str]) -> None:
        """Raise RecipeError for a glob that matches no linear that is pruned."""
        names = list(names)
        for glob in self.config.only:
            if not any(first_match(name, [glob]) for name in names):
                raise RecipeError(f"gather.only: {glob!r} matches no linear to prune; names look like {names[0]}")

    def prune(self, name: str, weight: Tensor, stats: InputStats, pattern: SparsityPattern, solve: Solve) -> Pruned:
        """Prune an (out, in) float32 weight in the best order found; as ever where there are no groups, or not asked.

        The notes say what share of the score the pattern retains in the order as it came, and in the one found.
        """
        if not isinstance(pattern, NM) or first_match(name, self.config.only) is None:
            return solve(weight, stats, pattern)
        scores = self.criterion.score(weight, stats)
        if len(scores) > self.config.rows:
            generator = torch.Generator().manual_seed(self.seed)
            sample = torch.randperm(len(scores), generator=generator)[: self.config.rows].sort().values
            scores = scores[sample.to(scores.device)]
        found = find_order(scores.unsqueeze(0), pattern, self.config.rounds, self.seed)
        made = solve_in_order(weight, stats, Gathered.of(pattern, found.places[0]), solve)
        notes = {**made.notes, "retained_before": found.before, "retained_after": found.after}
        return replace(made, notes=notes)
