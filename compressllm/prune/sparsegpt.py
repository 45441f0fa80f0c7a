"""SparseGPT: each weight that goes is made up for by those behind it in its row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.errors import CalibrationError, PatternError
from compressllm.core.factor import inverse_factor
from compressllm.core.parallel import for_chunks
from compressllm.core.pattern import NM, Group, SparsityPattern, Unstructured, keep_rows
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.scheme import SchemeName, parse_scheme
from compressllm.core.stats import InputStats, Need
from compressllm.prune.joint import Choose, quantizing_sweep

_ROWS = 256  # rows that one core changes at once


@PRUNERS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT:
    """Remove weights column by column, and make up for each by changing those behind it in its row.

    score_ij = W_ij^2 / U_jj^2, with U the upper Cholesky factor of the inverse of the damped Hessian and W as changed
    so far. N:M is chosen group by group, anything else block by block of columns: all weights of a block compete, as
    in the paper, and with ``0.5/row`` those of each row in it. Columns are taken in their natural order.

    The authors' code zeroes the weights of inputs that were always zero. Here the damping stands in for the size of
    such inputs, so that their weights compete by magnitude.

    With ``quantize`` the weights that stay are rounded in the same pass: what a column loses by both is made up for
    behind it. A group's scale is that of the largest weight that would stay if its mask were chosen when its first
    column is reached; the authors' code takes that of all dense weights. What is left are plain numbers that lie on the
    grid of the scheme: `compressllm quantize` with ``rtn: {fit: true}`` and the same scheme finds their codes.

    Args:
        block: Columns in which unstructured weights compete at once. In the paper 16 to 1024 do equally well, single
            columns and the whole matrix worse.
        damping: Share of the mean diagonal that is added to the Hessian's diagonal.
        quantize: A scheme that weights are rounded to as well, ``int4-g128`` say, or None.

    Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1 and section 3.5.
    """

    block: int = 128
    damping: float = 0.01
    quantize: SchemeName | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    group: ClassVar[Group] = "layer"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"option block={self.block}: a block has at least one column")
        if not 0.0 < self.damping < math.inf:
            raise ValueError(f"option damping={self.damping:g}: give a share of the mean diagonal above 0, as in 0.01")

    def prune(self, weight: Tensor, stats: InputStats, pattern: SparsityPattern) -> Pruned:
        """Prune, and change what stays to make up for it.

        Raises: PatternError for a pattern that does not fit; CalibrationError if the Hessian has no usable factor.
        """
        if reason := pattern.refuses(weight.shape):
            raise PatternError(reason)
        if not pattern.sparsity:  # nothing to make up for, not even in the last bit
            return Pruned(torch.ones_like(weight, dtype=torch.bool), weight.clone(), {"obs_loss": 0.0})
        factor = inverse_factor(stats, self.damping)
        block = width = self.block
        if isinstance(pattern, NM):
            block, width = -(-self.block // pattern.m) * pattern.m, pattern.m  # no group lies in two blocks
            choose: Choose = _by(pattern)
        elif isinstance(pattern, Unstructured):
            choose = _in_blocks(pattern.within(self.group))
        else:
            raise PatternError(f"sparsegpt prunes to N:M or by a fraction, not to {pattern}")
        if self.quantize is None:
            keep, left, losses = _sweep(weight, factor.upper, block, width, choose)
        else:
            scheme = parse_scheme(self.quantize)
            keep, left, losses = quantizing_sweep(weight, factor.upper, block, width, choose, scheme)
        loss = math.fsum(losses.tolist())
        if not math.isfinite(loss):  # every change of a weight is in it
            raise CalibrationError("sparsegpt: the changed weights are not finite; raise its option damping")
        notes = {"obs_loss": loss, "damp": factor.damping, "dead_inputs": factor.dead}
        return Pruned(keep, left, notes, factor.fallback)


def compensate(weight: Tensor, keep: Tensor, upper: Tensor, block: int = 128) -> Tensor:
    """The weights SparseGPT would leave under a given mask: (out, in) float32, new, +0.0 wherever ``keep`` is False.

    Args:
        weight: (out, in) float32, dense.
        keep: (out, in) bool, True = kept.
        upper: (in, in) float32, the factor of the inverse Hessian.
        block: Columns finished before those behind the block are changed; moves last bits only.
    """
    return _sweep(weight, upper, block, block, lambda scores, at: keep[:, at : at + scores.shape[1]])[1]


def _by(pattern: NM) -> Choose:
    """Chooses group by group."""
    return lambda scores, start: pattern.keep(scores)


def _in_blocks(pattern: Unstructured) -> Choose:
    """Chooses block by block of columns, such that the counts of all blocks add up to the pattern's own."""

    def choose(scores: Tensor, start: int) -> Tensor:
        rows, stop = scores.shape[0], start + scores.shape[1]
        if pattern.group == "layer":
            remove = pattern.removed_of(rows * stop) - pattern.removed_of(rows * start)
            return keep_rows(scores.reshape(1, -1), remove).view(scores.shape)
        return keep_rows(scores, pattern.removed_of(stop) - pattern.removed_of(start))

    return choose


def _sweep(weight: Tensor, upper: Tensor, block: int, width: int, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
    """Go over the columns of an (out, in) weight once, and choose what stays of ``width`` of them at a time.

    Args:
        upper: (in, in) factor of the inverse Hessian.
        block: Columns finished before those behind the block are changed; a multiple of ``width``.

    Returns: (out, in) bool mask; (out, in) weight, +0.0 off the mask; (out,) losses of the rows, half the sum of the
        squared errors of all steps, which estimates half the squared output error per token.
    """
    rows, columns = weight.shape
    left = weight.detach().T.clone(memory_format=torch.contiguous_format)  # so that a column is one run of memory
    keep = torch.empty_like(left, dtype=torch.bool)
    losses = torch.zeros_like(left[0])
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        corner = upper[start:stop, start:stop].contiguous()
        part = _Block(left[start:stop], corner, keep[start:stop], torch.empty_like(left[start:stop]))

        def finish(every: slice, part: _Block = part, start: int = start) -> None:
            part.walk_(0, part.weight.shape[0], width, lambda scores, at: choose(scores, start + at))
            losses.add_(part.errors.square().sum(0), alpha=0.5)

        def push(some: slice, part: _Block = part, start: int = start, stop: int = stop) -> None:
            left[stop:, some].addmm_(upper[start:stop, stop:].mT, part.errors[:, some], alpha=-1)

        for_chunks(finish, 0, rows, rows, weight.device)  # on one core: its steps are too small to share out
        if stop < columns:
            for_chunks(push, 0, rows, _ROWS, weight.device)
    return keep.T.contiguous(), left.masked_fill_(~keep, 0.0).T.contiguous(), losses


@dataclass(frozen=True)
class _Block:
    """Some columns of a weight, which have heard of all columns before them.

    Args:
        weight: (block, out) float32, changed by the columns as they are done.
        upper: (block, block) float32, their corner of the factor.
        keep: (block, out) bool.
        errors: (block, out) float32. As soon as it is known what stays of a column c, 1 / U_cc where a weight goes and
            0 elsewhere; once the column is done, times that weight.
    """

    weight: Tensor
    upper: Tensor
    keep: Tensor
    errors: Tensor

    def walk_(self, start: int, stop: int, width: int, choose: Choose | None) -> None:
        """Do the columns from ``start`` to ``stop``, one half and then the other.

        Each column is changed by the same terms as in a loop that tells all columns behind of every single one, but
        most of them are summed up in products of larger matrices.
        """
        if choose and stop - start <= width:
            self._choose_(start, stop, choose)
            width, choose = 1, None
        if stop - start == 1:
            self.errors[start].mul_(self.weight[start])
            return
        middle = start + max(1, (stop - start) // width // 2) * width
        self.walk_(start, middle, width, choose)
        self.weight[middle:stop].addmm_(self.upper[start:middle, middle:stop].mT, self.errors[start:middle], alpha=-1)
        self.walk_(middle, stop, width, choose)

    def _choose_(self, start: int, stop: int, choose: Choose) -> None:
        scale = self.upper.diagonal()[start:stop, None]
        scores = self.weight[start:stop].abs().div_(scale)  # roots of the paper's, which rank alike and do not overflow
        keep = self.keep[start:stop].copy_(choose(scores.T, start).T)
        torch.div(~keep, scale, out=self.errors[start:stop])
