"""Sparsity patterns: which weights may be kept together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from compressllm.core.errors import PatternError

Group = Literal["row", "layer"]


@runtime_checkable
class SparsityPattern(Protocol):
    """A rule for choosing what stays. A frozen value; ``parse_pattern(str(p)) == p`` unless it has an order as well."""

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed."""
        ...

    def keep(self, scores: Tensor) -> Tensor:
        """Keep the highest scores: (out, in) float -> (out, in) bool, exact count, ties included.

        Among equal scores the lower column is removed first. Raises PatternError if the shape
        does not fit or a score is NaN.
        """
        ...

    def violations(self, keep: Tensor) -> int:
        """Number of groups of a (out, in) bool mask that keep more than the pattern allows."""
        ...

    def refuses(self, shape: torch.Size | tuple[int, ...]) -> str | None:
        """Why a weight of this (out, in) shape cannot take the pattern, or None if it can."""
        ...


@dataclass(frozen=True)
class NM:
    """Keep ``n`` of every ``m`` consecutive inputs of each row (research code often counts what it removes)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise PatternError(
                f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m} weights; "
                "N:M needs 0 < N < M, for example 2:4"
            )
        if self.m > 64:
            raise PatternError(f"pattern {self.n}:{self.m}: groups of at most 64 weights are supported")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed."""
        return 1.0 - self.n / self.m

    def refuses(self, shape: torch.Size | tuple[int, ...]) -> str | None:
        """Why a weight of this (out, in) shape cannot take the pattern."""
        if shape[-1] % self.m:
            return f"{shape[-1]} inputs are not a multiple of {self.m}, as {self} needs"
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, the exact number of highest scores kept in each group."""
        _check_scores(scores)
        if reason := self.refuses(scores.shape):
            raise PatternError(reason)
        # A weight's rank is the number of neighbours that beat it. Counting all pairs of a group is
        # exact, free of sorting, and runs as a few dense passes over strided columns.
        columns = scores.reshape(scores.shape[0], -1, self.m).unbind(-1)
        beaten_by = [torch.zeros(c.shape, dtype=torch.uint8, device=c.device) for c in columns]
        for low in range(self.m):
            for high in range(low + 1, self.m):
                wins = columns[high] >= columns[low]  # a tie goes to the higher column
                beaten_by[low] += wins
                beaten_by[high] += ~wins
        return (torch.stack(beaten_by, -1) < self.n).view(scores.shape)

    def violations(self, keep: Tensor) -> int:
        """Number of groups that keep more than the pattern allows."""
        if reason := self.refuses(keep.shape):
            raise PatternError(reason)
        kept = keep.reshape(keep.shape[0], -1, self.m).sum(-1, dtype=torch.uint8)
        return int((kept > self.n).sum())


@dataclass(frozen=True)
class Unstructured:
    """Remove a fraction of the weights, counted per row or over the whole matrix.

    Args:
        fraction: Fraction removed, 0 to 1.
        group: The set in which scores compete: each ``row`` (as Wanda), or the whole ``layer`` (as
            magnitude pruning); None leaves the choice to the method.
    """

    fraction: float
    group: Group | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise PatternError(f"sparsity {self.fraction:g} is outside 0 to 1; give the fraction removed, as in 0.5")

    def __str__(self) -> str:
        return f"{self.fraction}" + (f"/{self.group}" if self.group else "")

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed."""
        return self.fraction

    def within(self, group: Group) -> Unstructured:
        """The pattern with its group filled in, if it was left open."""
        return self if self.group else Unstructured(self.fraction, group)

    def refuses(self, shape: torch.Size | tuple[int, ...]) -> str | None:
        """Never: every shape will do."""
        return None

    def removed_of(self, count: int) -> int:
        """How many of ``count`` weights go: rounded down, but not by a float's last bit (0.29 of 100 is 29)."""
        return int(count * self.fraction + 1e-9)

    def keep(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, the exact number of highest scores kept in each group."""
        _check_scores(scores)
        if self.group == "layer":
            return keep_rows(scores.reshape(1, -1), self.removed_of(scores.numel())).view(scores.shape)
        return keep_rows(scores, self.removed_of(scores.shape[1]))

    def violations(self, keep: Tensor) -> int:
        """Number of groups that keep more than the pattern allows."""
        if self.group == "layer":
            keep = keep.reshape(1, -1)
        allowed = keep.shape[1] - self.removed_of(keep.shape[1])
        return int((keep.sum(1) > allowed).sum())


def parse_pattern(text: str | SparsityPattern) -> SparsityPattern:
    """Read ``"2:4"`` (keep 2 of 4), ``"0.5"`` or ``"50%"``, or ``"0.5/row"`` and ``"0.5/layer"``.

    Raises: PatternError.
    """
    if not isinstance(text, str):
        return text
    if found := re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", text):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"\s*(\d*\.?\d+(?:e-\d+)?)\s*(%?)\s*(?:/\s*(row|layer)\s*)?", text):
        fraction = float(found[1]) / (100.0 if found[2] else 1.0)
        return Unstructured(fraction, found[3])  # type: ignore[arg-type]
    raise PatternError(f"cannot read pattern {text!r}; give N:M as in 2:4, or a fraction removed as in 0.5 or 0.5/row")


def _check_scores(scores: Tensor) -> None:
    if scores.isnan().any():
        raise PatternError("scores hold NaN: the weights or their input statistics are not finite")


def keep_rows(scores: Tensor, remove: int) -> Tensor:
    """(rows, n) scores -> bool: exactly ``remove`` of each row's lowest go, the lower column first among equals."""
    if remove == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(remove, dim=1, keepdim=True).values
    below = scores < threshold
    tied = scores == threshold
    still = remove - below.sum(1, keepdim=True)
    return ~(below | (tied & (tied.cumsum(1) <= still)))
