"""SparseGPT: each weight that goes is made up for by those behind it in its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError, PatternError
from compressllm.core.parallel import for_chunks
from compressllm.core.pattern import NM, Group, SparsityPattern, Unstructured, keep_rows
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.stats import InputStats, Need
from compressllm.prune.factor import inverse_factor

_ROWS = 256  # rows that one core changes at once

#: From the (out, width) scores of some columns, and the first of them, to their bool mask: True = kept.
Choose = Callable[[Tensor, int], Tensor]


@PRUNERS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT:
    """Remove weights column by column, and make up for each by changing those behind it in its row.

    score_ij = W_ij^2 / U_jj^2, with U the upper Cholesky factor of the inverse of the damped Hessian and W as changed
    so far. N:M is chosen group by group, anything else block by block of columns. Unstructured, all rows of a block
    compete, as in the paper; ``0.5/row`` lets those of a row within the block.

    Columns are taken in their natural order. An input that was always zero is not dropped, as the authors' code
    does: the damping stands in for its size, so that its weights compete by magnitude.

    Args:
        block: Columns in which unstructured weights compete at once. A few dozen or more do equally well.
        damping: Share of the mean diagonal that is added to the Hessian's diagonal.

    Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1.
    """

    block: int = 128
    damping: float = 0.01
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    group: ClassVar[Group] = "layer"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"option block={self.block}: a block has at least one column")
        if not 0.0 < self.damping < math.inf:
            raise ValueError(f"option damping={self.damping:g}: give a share of the mean diagonal above 0, as in 0.01")

    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Prune, and change what stays to make up for it."""
        if reason := pattern.refuses(weight.shape):
            raise PatternError(reason)
        if not pattern.sparsity:  # nothing to make up for, not even in the last bit
            return Pruned(torch.ones_like(weight, dtype=torch.bool), weight.clone(), {"obs_loss": 0.0})
        factor = inverse_factor(stats, self.damping)
        sweep = _Sweep.over(weight, factor.upper)
        if isinstance(pattern, NM):
            block = -(-self.block // pattern.m) * pattern.m  # no group lies in two blocks
            sweep.run_(block, pattern.m, lambda scores, start: pattern.keep(scores))
        elif isinstance(pattern, Unstructured):
            sweep.run_(self.block, self.block, _in_blocks(pattern.within(self.group)))
        else:
            raise PatternError(f"sparsegpt prunes to N:M or by a fraction, not to {pattern}")
        notes = {"obs_loss": sweep.loss(), "damp": factor.damping, "dead_inputs": factor.dead}
        return Pruned(sweep.keep.T.contiguous(), sweep.pruned(), notes, factor.fallback)


def compensate(weight: Tensor, keep: Tensor, upper: Tensor, block: int = 128) -> Tensor:
    """The weights SparseGPT would leave under a given mask: (out, in) float32, new, +0.0 wherever ``keep`` is False.

    Args:
        weight: (out, in) float32, dense.
        keep: (out, in) bool, True = kept.
        upper: (in, in) float32, the factor of the inverse Hessian.
        block: Columns finished before those behind are changed; moves last bits only.
    """
    sweep = _Sweep.over(weight, upper)
    sweep.run_(block, block, lambda scores, start: keep[:, start : start + scores.shape[1]])
    return sweep.pruned()


def _in_blocks(pattern: Unstructured) -> Choose:
    """The choice of one block of columns, such that the counts of all blocks add up to the pattern's exactly."""

    def choose(scores: Tensor, start: int) -> Tensor:
        rows, stop = scores.shape[0], start + scores.shape[1]
        if pattern.group == "layer":
            remove = pattern.removed_of(rows * stop) - pattern.removed_of(rows * start)
            return keep_rows(scores.reshape(1, -1), remove).view(scores.shape)
        return keep_rows(scores, pattern.removed_of(stop) - pattern.removed_of(start))

    return choose


@dataclass(frozen=True)
class _Sweep:
    """One pass over the columns of a weight. All is held transposed, so that a column is one run of memory.

    Args:
        weight: (in, out) float32, changed as the pass goes on.
        upper: (in, in) float32 factor of the inverse Hessian.
        keep: (in, out) bool, known up to where the pass has come.
        errors: (in, out) float32; 1 / U_cc where a weight of column c goes and 0 elsewhere, as soon as that is known,
            and once the column is done times the weight that went.
        losses: (out,) float32, half the squared errors of each row, once the pass is over.
    """

    weight: Tensor
    upper: Tensor
    keep: Tensor
    errors: Tensor
    losses: Tensor

    @classmethod
    def over(cls, weight: Tensor, upper: Tensor) -> _Sweep:
        """Before the first column of an (out, in) weight, of which it takes a copy."""
        columns = weight.detach().T.clone(memory_format=torch.contiguous_format)
        keep = torch.empty_like(columns, dtype=torch.bool)
        return cls(columns, upper, keep, torch.empty_like(columns), torch.zeros_like(columns[0]))

    def run_(self, block: int, width: int, choose: Choose) -> None:
        """Go over all columns, choosing what stays of ``width`` of them at a time.

        Args:
            block: Columns finished before those behind the block hear of them; a multiple of ``width``.
        """
        columns, rows = self.weight.shape
        for start in range(0, columns, block):
            stop = min(start + block, columns)

            def finish(every: slice, start: int = start, stop: int = stop) -> None:
                self._walk_(start, stop, width, choose)
                errors = self.errors[start:stop]
                self.losses.add_(errors.square().sum(0), alpha=0.5)

            def push(part: slice, start: int = start, stop: int = stop) -> None:
                self._push_(start, stop, columns, part)

            # Steps within a block are small, so that cores would only wait for each other.
            for_chunks(finish, 0, rows, rows, self.weight.device)
            if stop < columns:
                for_chunks(push, 0, rows, _ROWS, self.weight.device)

    def loss(self) -> float:
        """Estimate of the layer's loss, half the squared output error per token: the sum of all steps' own.

        Raises: CalibrationError if it is not finite, and the weights with it.
        """
        loss = math.fsum(self.losses.tolist())
        if not math.isfinite(loss):
            raise CalibrationError("SparseGPT left weights that are not finite; raise its option damping")
        return loss

    def pruned(self) -> Tensor:
        """(out, in) weight after the pass, +0.0 where weights went. Uses up the pass's own."""
        return self.weight.masked_fill_(~self.keep, 0.0).T.contiguous()

    def _walk_(self, start: int, stop: int, width: int, choose: Choose | None) -> None:
        """Do these columns, one half after the other; they have heard already of all columns before them.

        Halving changes each column by the same sums as a loop would that goes on from one to the next, but does most
        of it in products of matrices.
        """
        if choose and stop - start <= width:
            self._choose_(start, stop, choose)
            width, choose = 1, None
        if stop - start == 1:
            self.errors[start].mul_(self.weight[start])
            return
        middle = start + max(1, (stop - start) // width // 2) * width
        self._walk_(start, middle, width, choose)
        self._push_(start, middle, stop, slice(None))
        self._walk_(middle, stop, width, choose)

    def _choose_(self, start: int, stop: int, choose: Choose) -> None:
        """Settle which weights of these columns go."""
        scale = self.upper.diagonal()[start:stop, None]
        scores = self.weight[start:stop].div(scale).square_()
        keep = self.keep[start:stop].copy_(choose(scores.T, start).T)
        torch.div(~keep, scale, out=self.errors[start:stop])

    def _push_(self, start: int, middle: int, stop: int, rows: slice) -> None:
        """Change the columns from ``middle`` to ``stop`` to make up for what went in those before ``middle``."""
        across = self.upper[start:middle, middle:stop].mT
        self.weight[middle:stop, rows].addmm_(across, self.errors[start:middle, rows], alpha=-1)
