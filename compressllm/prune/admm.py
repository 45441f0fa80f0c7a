"""ADMM: a solver that looks for the mask and for the weights under it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.parallel import map_batches
from compressllm.core.pattern import NM, Group, SparsityPattern, Unstructured
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.stats import InputStats, Need
from compressllm.prune.refit import ScaledHessian, check_range, damped_energy, refit_scaled, shared_hessian
from compressllm.prune.rows import each_rows, on_one_thread

#: Inverses are kept for all linears of an input while those of all stages take at most so many bytes.
SHARED_BYTES = 256 << 20

#: The search is over when this share of the kept weights, or less, has changed.
SETTLED = 1e-3

#: Tolerance of the refit. The search ends so near the best weights on its mask that more steps change the loss by less
#: than 0.1 %, on correlated inputs of 576 and 1536.
NEAR = 1e-2


@PRUNERS.register("admm")
@dataclass(frozen=True)
class ADMM:
    """Search mask and weights together by operator splitting, then refit the weights: slow, and the best mask.

    Minimises ``||(W - V) X||^2 + λ||W - V||^2`` over V of the pattern. One copy of V is free and near to W, another
    has the pattern; a penalty ρ, small at first, draws them together:

        B = (A + ρI)^-1 (A W + ρ(Z - U)),   Z = project(B + U),   U = U + B - Z

    where A is the damped Hessian scaled to a diagonal of 1, and W and V are scaled to match.

    Args:
        damping: λ as a fraction of the Hessian's mean diagonal.
        stages: How many values the penalty takes. Each costs an inverse of (in, in), and few cost quality.
        steps: Steps at each penalty.
        penalty_start: First penalty, relative to the diagonal of A; the next ones are in geometric progression.
        penalty_end: Last penalty. What it settles on at 1 is, to first order, not bettered by any swap of a kept
            for a removed weight.
        refit_steps: At most so many steps of conjugate gradients on the mask that was found.

    Source: Meng et al., ALPS, arXiv 2406.07831, algorithms 1 and 2; scaled dual variables as in Boža, Fast and
        Effective Weight Update for Pruned LLMs, arXiv 2401.02938.
    """

    damping: float = 0.01
    stages: int = 16
    steps: int = 2
    penalty_start: float = 0.1
    penalty_end: float = 1.0
    refit_steps: int = 10

    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    group: ClassVar[Group] = "layer"

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 0.0)
        check_range("stages", self.stages, 1)
        check_range("steps", self.steps, 1)
        check_range("penalty_start", self.penalty_start, 1e-4)  # what keeps a singular A invertible in float32
        check_range("penalty_end", self.penalty_end, self.penalty_start)
        check_range("refit_steps", self.refit_steps, 0)

    @torch.no_grad()
    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Search, then refit on the mask that the search ends with."""
        weight = weight.contiguous()  # another layout is summed in another order
        hessian = shared_hessian(stats, self.damping)
        search = Search(weight * hessian.scale, pattern)
        iterations, moved = 0, 1.0
        for penalty, inverse in self._inverses(stats, hessian):
            moved = search.run_(inverse, penalty, self.steps)
            iterations += self.steps
            if not moved and iterations > self.steps:
                break
        for _ in range(self.stages):  # nearly uncorrelated inputs move until the last penalty, and then settle
            if moved <= SETTLED:
                break
            moved = search.run_(inverse, penalty, self.steps)
            iterations += self.steps
        keep = search.mask()
        fit = refit_scaled(weight, keep, hessian, search.both / hessian.scale, self.refit_steps, NEAR)
        whole = damped_energy(weight, hessian)
        loss = float(fit.loss.double().sum())
        notes = {
            "damped_loss": loss / whole if whole else 0.0,
            "iterations": iterations,
            "support_change": moved,
            "refit_steps": fit.steps,
        }
        return Pruned(keep, fit.weight, notes)

    def penalties(self) -> list[float]:
        """The penalty of each stage."""
        ratio = self.penalty_end / self.penalty_start
        return [self.penalty_start * ratio ** (stage / max(1, self.stages - 1)) for stage in range(self.stages)]

    def _inverses(self, stats: InputStats, hessian: ScaledHessian) -> Iterator[tuple[float, Tensor]]:
        """Each penalty ρ and (in, in) ``(A + ρI)^-1``."""
        penalties, matrix = self.penalties(), hessian.matrix

        def inverse(stage: int) -> Tensor:
            return _inverse(matrix, penalties[stage])

        # LAPACK's last bits depend on its threads, so each inverse has one; where all fit, as many are made at once.
        def every() -> list[Tensor]:
            made = map_batches(inverse, len(penalties), matrix.device, first_alone=False)
            return list(made)

        if self.stages * matrix.numel() * matrix.element_size() <= SHARED_BYTES:
            yield from zip(penalties, stats.derive(("inverses", self.damping, *penalties), every), strict=True)
            return
        for stage, penalty in enumerate(penalties):
            yield penalty, on_one_thread(partial(inverse, stage), matrix.device)


class Search:
    """The state of a search: ``S = B + U``, from which the other variables follow.

    Args:
        dense: (out, in) float32 scaled weight W.
        pattern: What the sparse copy keeps.
    """

    def __init__(self, dense: Tensor, pattern: SparsityPattern) -> None:
        self.dense = dense
        self.pattern = pattern
        self.both = dense.clone()
        self.penalty: float | None = None
        self.keep = torch.zeros(dense.shape, dtype=torch.bool, device=dense.device)

    def mask(self) -> Tensor:
        """(out, in) bool, exactly as many as the pattern says."""
        return self.pattern.keep(self.both.square())

    def run_(self, inverse: Tensor, penalty: float, steps: int) -> float:
        """Take some steps at one penalty ρ, given (in, in) ``(A + ρI)^-1``.

        Returns: the share of the sparse copy's weights that it did not hold at the call before.
        """
        rescale = (self.penalty or penalty) / penalty  # U is the dual variable over ρ
        self.penalty = penalty
        largest = selection(self.pattern, self.both)
        moved: list[Tensor] = []  # from several threads

        def work(rows: slice) -> None:
            dense, both = self.dense[rows], self.both[rows]  # views: `both` changes in place
            for step in range(steps):
                keep = largest(both, rows)
                sparse = torch.where(keep, both, 0.0)  # Z
                both.sub_(sparse)  # U
                if step == 0:
                    both.mul_(rescale)
                    moved.append((keep & ~self.keep[rows]).count_nonzero())
                    self.keep[rows] = keep
                both.add_(dense)
                torch.addmm(
                    both, sparse.sub_(both), inverse, alpha=penalty, out=both
                )  # B + U, with A W = (A + ρI) W - ρW

        each_rows(work, self.dense)
        return sum(map(int, moved)) / max(1, int(self.keep.count_nonzero()))


def selection(pattern: SparsityPattern, values: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """What picks the largest of (rows, in) values while a search goes on: near to the pattern, ties aside, and quick.

    In unstructured patterns that is a threshold, right for the (out, in) ``values`` given here and held from then on:
    to find it takes as long as a step.
    """
    if isinstance(pattern, NM):
        return lambda found, rows: _largest_of_groups(found, pattern)
    if isinstance(pattern, Unstructured):
        least = _least_kept(values.abs(), pattern)
        return lambda found, rows: found.abs() >= least[rows]
    keep = pattern.keep(values.square())
    return lambda found, rows: keep[rows]


def _least_kept(sizes: Tensor, pattern: Unstructured) -> Tensor:
    """(out, 1) least of the (out, in) sizes that are kept in each row, the same for all if the layer is the group."""
    groups = sizes.reshape(1, -1) if pattern.group == "layer" else sizes
    removed = pattern.removed_of(groups.shape[1])
    if removed == groups.shape[1]:
        return sizes.new_full((len(sizes), 1), torch.inf)
    return groups.kthvalue(removed + 1, dim=1, keepdim=True).values.expand(len(sizes), 1)


def _largest_of_groups(values: Tensor, pattern: NM) -> Tensor:
    """(rows, in) bool: the values whose size is at least the n-th largest of their group."""
    groups = values.abs().view(len(values), -1, pattern.m)
    columns: list[Tensor] = list(groups.permute(2, 0, 1).contiguous())
    # A pass carries the largest column to the end and drops it. Few passes of dense operations: sorting is slower.
    for _ in range(pattern.n - 1):
        for low in range(len(columns) - 1):
            one, other = columns[low], columns[low + 1]
            columns[low], columns[low + 1] = torch.minimum(one, other), torch.maximum(one, other)
        columns.pop()
    least = columns[0]
    for column in columns[1:]:
        least = torch.maximum(least, column)
    return groups.ge(least[..., None]).view(values.shape)


@torch.no_grad()
def _inverse(matrix: Tensor, penalty: float) -> Tensor:
    """``(A + ρI)^-1`` of an (in, in) positive semidefinite A."""
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
