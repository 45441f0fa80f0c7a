"""Which window comes when: a function of the seed and of how many came before, whatever the number of processes."""

from __future__ import annotations

import torch


class Order:
    """Windows in a new order every epoch.

    Args:
        windows: How many there are.
        seed: Fixes the orders.
    """

    def __init__(self, windows: int, seed: int) -> None:
        self._windows, self._seed = windows, seed
        self._epoch, self._shuffled = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, sample: int) -> int:
        """The window of sample ``sample`` of the whole training."""
        epoch, place = divmod(sample, self._windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._shuffled = epoch, torch.randperm(self._windows, generator=generator)
        return int(self._shuffled[place])
