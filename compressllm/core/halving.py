"""Batches that do not fit the device's memory are cut in two, and so are those after them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


@dataclass
class Halving:
    """How many rows of a batch are computed at once: all, until the device runs out of memory.

    Args:
        warn: Told in one line whenever it changes.
        most: Rows at once, or None for whole batches.
    """

    warn: Callable[[str], None] = lambda message: None
    most: int | None = None

    def run(self, work: Callable[[Tensor], R], batch: Tensor, sizes: Collection[int] | None = None) -> list[R]:
        """What ``work`` makes of a batch, or of the parts it is cut into, in order.

        Args:
            work: What it did before it ran out of memory must leave no trace.
            sizes: Numbers of rows that ``work`` can take, 1 among them; None if it takes any.

        Raises: torch.OutOfMemoryError if one row is too many.
        """
        done: list[R] = []
        while len(batch):
            count = min(len(batch), self.most or len(batch))
            if sizes is not None and count not in sizes:
                count = max(size for size in sizes if size <= count)
            try:
                done.append(work(batch[:count]))
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
            else:
                batch = batch[count:]
                continue
            self.halve_(count)  # not while the error is handled: it holds what the failed call had made
        return done

    def halve_(self, count: int) -> int:
        """Take half of so many rows at once from now on, and say so; how many that is."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.most = max(1, count // 2)
        self.warn(f"out of memory with {count} windows at once; going on with {self.most}")
        return self.most
