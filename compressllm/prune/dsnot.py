"""DSnoT: dynamic sparse no training, a refiner that swaps kept and removed weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressllm.core.pattern import NM, SparsityPattern
from compressllm.core.protocols import PRUNERS, Pruned, Pruner
from compressllm.core.stats import InputStats, Need
from compressllm.prune.refiner import Refiner
from compressllm.prune.wanda import Wanda

_AT_ONCE = 1 << 21  # weights refined at once, so that what is derived from them never adds up to copies of the layer


@PRUNERS.register("dsnot")
@dataclass(frozen=True)
class DSnoT(Refiner):
    """Swap kept and removed weights until a row's mean output is what it was; no weight is changed.

    With ``D_ij = W_ij * mean(X_j)``, the mean output of a row is off by ``r = sum of D over its removed weights``. Each
    cycle revives the removed weight with the largest ``|D_j| / var(X_j) ** variance_power`` of the sign that brings r
    nearer to 0, and removes a kept one: the one with the lowest Wanda score among those whose removal does the same
    or, under N:M, in the group of the revived one. A row ends when r is small or would change its sign, or when it has
    no such pair left.

    Departures from the published code: the variance is over all tokens instead of within each sequence; the threshold
    is per token; all linears are refined, not attention alone; under N:M the weight to remove is chosen by Wanda score
    whatever the initial method, and a swap that would enlarge |r| ends the row; a row that ends with a larger |r|, or
    a larger loss than ``max_rise`` allows, gets its initial mask back.

    Args:
        init: The pruner whose mask it starts from.
        cycles: Swaps a row at most.
        threshold: A row is done when its mean output is off by no more than this; the published 0.1 is of the sum over
            2048 tokens.
        variance_power: How far an input's variance counts against reviving its weight; 0 leaves it out.
        same_sign: Stop before r changes its sign. N:M always does.
        max_rise: A row's refined mask counts only if its loss rises by no more than this fraction; inf for no limit.
        exact: Take that loss from the inputs' whole second moment, at its cost, instead of as if inputs were
            uncorrelated. Done without being asked if the initial pruner reads it anyway.

    Source: Zhang et al., Dynamic Sparse No Training, arXiv 2310.08915, section 3 and algorithm 1.
    """

    init: Pruner = field(default_factory=Wanda)
    cycles: int = 50
    threshold: float = 5e-5
    variance_power: float = 1.0
    same_sign: bool = True
    max_rise: float = 0.0
    exact: bool = False
    reads: ClassVar[frozenset[Need]] = frozenset({"mean", "var", "sqnorm"})

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"cycles {self.cycles} is less than 1")
        for name in ("threshold", "variance_power", "max_rise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative; give 0 or more")

    @property
    def needs(self) -> frozenset[Need]:
        """Input statistics that it and its initial pruner read."""
        return super().needs | (frozenset({"hessian"}) if self.exact else frozenset())

    def refine(self, weight: Tensor, keep: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Better the mask row by row; each row, and each group of N:M, keeps as many as it did."""
        parts = max(1, math.ceil(weight.numel() / _AT_ONCE))
        pieces = zip(weight.tensor_split(parts), keep.tensor_split(parts), strict=True)
        done = [self._refine_rows(w.contiguous(), k.contiguous(), stats, pattern) for w, k in pieces]
        refined = torch.cat([rows for rows, _ in done])
        return Pruned(refined, torch.where(refined, weight, 0.0), _notes([facts for _, facts in done], len(weight)))

    def _refine_rows(
        self, weight: Tensor, keep: Tensor, stats: InputStats, pattern: SparsityPattern
    ) -> tuple[Tensor, Tensor]:
        """The refined mask of some rows, and (6,) float64 sums of facts about them, as `_notes` reads them."""
        spread = stats.need("var") ** self.variance_power
        contribution = weight * stats.need("mean")
        refined = swap(
            keep,
            contribution,
            torch.where(spread > 0, contribution / spread, 0.0),  # of a constant input there is no telling
            weight.abs() * stats.need("sqnorm").sqrt(),
            cycles=self.cycles,
            threshold=self.threshold,
            same_sign=self.same_sign,
            group=pattern.m if isinstance(pattern, NM) else None,
        )
        shift, loss = self._cost(weight, contribution, keep, stats)
        new_shift, new_loss = self._cost(weight, contribution, refined, stats)
        worse = (new_shift > shift) | (new_loss > loss * (1.0 + self.max_rise))
        refined = torch.where(worse[:, None], keep, refined)
        facts = (
            shift,
            torch.where(worse, shift, new_shift),
            loss,
            torch.where(worse, loss, new_loss),
            (refined & ~keep).sum(1),
            worse,
        )
        return refined, torch.stack([fact.double().sum() for fact in facts])

    def _cost(self, weight: Tensor, contribution: Tensor, keep: Tensor, stats: InputStats) -> tuple[Tensor, Tensor]:
        """Of each row: |r|, and the mean squared error of its output; both (out,)."""
        shift = off_by(contribution, keep)
        lost = torch.where(keep, 0.0, weight)
        if stats.hessian is not None and "hessian" in self.needs:
            return shift.abs(), ((lost @ stats.hessian) * lost).sum(1)
        # The mean of a square is the mean's square and the variance, to which uncorrelated inputs add up.
        return shift.abs(), shift.square() + (lost.square() * stats.need("var")).sum(1)


def off_by(contribution: Tensor, keep: Tensor) -> Tensor:
    """By how much each row's mean output is off, dense minus pruned: (out, in) -> (out,)."""
    return torch.where(keep, 0.0, contribution).sum(1)


def swap(
    keep: Tensor,
    contribution: Tensor,
    key: Tensor,
    score: Tensor,
    *,
    cycles: int,
    threshold: float,
    same_sign: bool,
    group: int | None = None,
) -> Tensor:
    """Swap weights of each row until the contributions of the removed ones add up to almost nothing.

    Rows are refined side by side, one swap a cycle each. What is revived was removed in ``keep``, and what is removed
    was kept in it, so that no weight moves twice. A row that has ended is not touched again.

    Args:
        keep: (out, in) bool mask to start from, True = kept.
        contribution: (out, in) what each weight adds to the mean output of its row.
        key: (out, in), the sign of ``contribution`` or 0; the larger, the sooner a weight is revived, and at 0 never.
        score: (out, in), not negative; the smaller, the sooner a weight is removed.
        cycles: Swaps a row at most.
        threshold: A row ends when the removed contributions add up to no more than this.
        same_sign: End a row before that sum changes its sign.
        group: M, if swaps are to stay within groups of M columns; ``same_sign`` then counts as set.

    Returns: A new (out, in) mask with as many weights in each row, and in each group.
    """
    # First index: 0 for rows whose sum is negative, 1 for those where it is positive. Both halves of a swap push the
    # sum the same way, but for the second one within a group, which takes what is there.
    revivals = torch.stack([_first(key, ~keep & (key < 0), cycles), _first(-key, ~keep & (key > 0), cycles)])
    removals = None
    if group is None:
        falling, rising = keep & (contribution < 0), keep & (contribution > 0)
        removals = torch.stack([_first(score, rising, cycles), _first(score, falling, cycles)])

    refined, rows = keep.clone(), torch.arange(keep.shape[0], device=keep.device)
    error = off_by(contribution, keep)
    sign, active = error.sign(), error.abs() > threshold
    used = torch.zeros((2, keep.shape[0]), dtype=torch.int64, device=keep.device)
    for _ in range(cycles):
        if not active.any():
            break
        side = (error > 0).long()
        revived = revivals[side, rows, used[side, rows]]
        if removals is not None:
            removed = removals[side, rows, used[side, rows]]
        else:
            removed = _cheapest_in_group(revived, keep & refined, score, group or 1)
        active &= (revived >= 0) & (removed >= 0)
        after = error + contribution[rows, removed] - contribution[rows, revived]
        if same_sign or group is not None:
            active &= (after.sign() == sign) & (after.abs() <= error.abs())
        refined[rows[active], revived[active]] = True
        refined[rows[active], removed[active]] = False
        used[side, rows] += active
        error = torch.where(active, after, error)
        active &= error.abs() > threshold
    return refined


def _first(rank: Tensor, among: Tensor, count: int) -> Tensor:
    """The columns of each row's ``count`` lowest ranks among some, in order, the lower column first among equals.

    A selection in place of a sort: of thousands of columns only ``count`` can be used.

    Args:
        rank: (out, in), no NaN.
        among: (out, in) bool.

    Returns: (out, min(count, in) + 1) int64, -1 after the last.
    """
    rank = torch.where(among, rank, torch.inf)
    count = min(count, rank.shape[1])
    bound = rank.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    chosen, tied = rank < bound, rank == bound
    spare = count - chosen.sum(1, keepdim=True, dtype=torch.int32)
    if bool((tied.sum(1, keepdim=True, dtype=torch.int32) > spare).any()):
        tied &= tied.cumsum(1, dtype=torch.int32) <= spare
    columns = (chosen | tied).nonzero()[:, 1].view(-1, count)
    columns = columns.gather(1, rank.gather(1, columns).argsort(dim=1, stable=True))
    columns = torch.where(among.gather(1, columns), columns, -1)
    return torch.nn.functional.pad(columns, (0, 1), value=-1)


def _cheapest_in_group(column: Tensor, available: Tensor, score: Tensor, size: int) -> Tensor:
    """The available column of the lowest score in the group of ``column``, -1 if there is none: (out,) -> (out,)."""
    start = column.clamp_min(0) // size * size
    columns = start[:, None] + torch.arange(size, device=column.device)
    free = available.gather(1, columns)
    best = torch.where(free, score.gather(1, columns), torch.inf).argmin(1, keepdim=True)
    return torch.where(free.gather(1, best), columns.gather(1, best), -1).squeeze(1)


def _notes(facts: list[Tensor], rows: int) -> dict[str, Any]:
    """What the manifest says: means over rows of |r| and of the squared output error, before and after."""
    shift, new_shift, loss, new_loss, swaps, reverted = torch.stack(facts).sum(0).tolist()
    return {
        "shift_before": shift / rows,
        "shift_after": new_shift / rows,
        "loss_before": loss / rows,
        "loss_after": new_loss / rows,
        "swaps": int(swaps),
        "rows_reverted": int(reverted),
    }
