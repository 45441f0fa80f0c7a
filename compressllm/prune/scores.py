"""Gather the scores that an order of channels is chosen by."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.errors import FormatError
from compressllm.models.channels import Channels, Slot
from compressllm.prune.fold import sets_of


class ScoreRows:
    """Rows of scores of some channels, from every linear that reads them.

    Each linear counts the same: its scores are divided by their sum. Of more rows than ``limit``, each linear gives a
    random sample in proportion to its own.

    Args:
        channels: The channels.
        model: Knows how many rows its linears have.
        limit: Most rows to keep; at least one of each linear is.
        seed: Decides which.
    """

    def __init__(self, channels: Channels, model: PreTrainedModel, limit: int, seed: int) -> None:
        self.channels, self._limit = channels, limit
        self.available = sum(model.get_parameter(one.tensor).shape[0] * one.repeat for one in channels.readers)
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether every linear has been added."""
        return len(self._parts) == len(self.channels.readers)

    @property
    def kept(self) -> int:
        """Rows in `matrix`."""
        return sum(part.shape[1] for part in self._parts)

    def add_(self, slot: Slot, scores: Tensor) -> None:
        """Count a reader's (out, in) scores.

        Raises: FormatError if they are not finite.
        """
        total = scores.sum(0, dtype=torch.float64).sum()
        if not total.isfinite():
            raise FormatError(f"{slot.tensor}: its scores are not finite; check the checkpoint's weights")
        rows = sets_of(slot, scores, self.channels.sets, self.channels.size)  # (sets, rows, size)
        count = rows.shape[1]
        weight = 1 / float(total) if float(total) > 0 else 0.0  # all zeros tell nothing
        if self.available > self._limit:
            kept = max(1, self._limit * count // self.available)
            sample = torch.randperm(count, generator=self._generator)[:kept].sort().values
            rows, weight = rows[:, sample.to(rows.device)], weight * count / kept
        self._parts.append(rows * weight)

    def matrix(self) -> Tensor:
        """(sets, rows, size), the linears one below the other."""
        return torch.cat(self._parts, dim=1)
