"""N:M in an order of its own for each linear: dense weights stay where they are, a kernel gathers its inputs first."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from compressllm.core.errors import PatternError
from compressllm.core.pattern import NM, SparsityPattern


@dataclass(frozen=True)
class Gathered:
    """An N:M pattern that holds once the inputs of the linear stand in an order of its own.

    The weight itself is stored as it came, so whoever runs it dense need not know; a kernel for N:M packs its columns
    in this order, and takes its inputs in it.

    Args:
        base: What holds in that order.
        order: For each place the input that stands there, (in,) long: a permutation.

    Raises: PatternError if it is none.
    """

    base: NM
    order: tuple[int, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not np.array_equal(np.sort(self.order), np.arange(len(self.order))):
            raise PatternError(f"{self.base} gathered: its order does not name each of {len(self.order)} inputs once")

    def __str__(self) -> str:
        return f"{self.base} gathered"

    @classmethod
    def of(cls, base: NM, order: Tensor | Sequence[int]) -> Gathered:
        """From an order in any form."""
        return cls(base, tuple(order.tolist() if isinstance(order, Tensor) else order))

    @classmethod
    def read(cls, base: NM, text: str) -> Gathered:
        """The inverse of `order_text`. Raises PatternError."""
        try:
            return cls(base, tuple(np.frombuffer(base64.b64decode(text, validate=True), "<u4").tolist()))
        except ValueError:
            raise PatternError(f"{base} gathered: its order is damaged") from None

    @property
    def order_text(self) -> str:
        """The order as it is written: 32-bit numbers, the lowest byte first, in base64."""
        return base64.b64encode(np.array(self.order, "<u4").tobytes()).decode()

    @property
    def places(self) -> Tensor:
        """The order, (in,) int64 on the CPU."""
        return torch.tensor(self.order, dtype=torch.int64)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed."""
        return self.base.sparsity

    def keep(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, the highest of each group of inputs that the order brings together."""
        if reason := self.refuses(scores.shape):
            raise PatternError(reason)
        return self.back(self.base.keep(self.ordered(scores)))

    def violations(self, keep: Tensor) -> int:
        """Number of groups that keep more than the pattern allows."""
        if reason := self.refuses(keep.shape):
            raise PatternError(reason)
        return self.base.violations(self.ordered(keep))

    def refuses(self, shape: torch.Size | tuple[int, ...]) -> str | None:
        """Why a weight of this (out, in) shape cannot take the pattern."""
        if shape[-1] != len(self.order):
            return f"{shape[-1]} inputs, and the order of {self} is of {len(self.order)}"
        return self.base.refuses(shape)

    def ordered(self, value: Tensor) -> Tensor:
        """(..., in) as it came -> (..., in) in the order."""
        return value.index_select(-1, self.places.to(value.device))

    def back(self, value: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        return value.index_select(-1, self.places.argsort().to(value.device))


def in_order_of(asked: SparsityPattern, recorded: SparsityPattern | None) -> SparsityPattern:
    """What a pattern that is asked for means of a linear whose recorded pattern has an order: the same, in that."""
    ordered = isinstance(asked, NM) and isinstance(recorded, Gathered)
    return Gathered(asked, recorded.order) if ordered else asked  # type: ignore[arg-type, union-attr]
