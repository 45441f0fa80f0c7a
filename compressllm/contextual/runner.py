"""What stands in for a module's forward while a model drafts: dense or sparse, as the control says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from compressllm.contextual.control import Control, Mode


class Runner(ABC):
    """Computes an MLP, or a linear, for a control's mode, and counts what it reads while drafting.

    Args:
        dense: What it stands for.
        control: Says what is being done.
        size: Weights of it all.
    """

    def __init__(self, dense: Callable[[Tensor], Tensor], control: Control, size: int) -> None:
        self.dense, self.control, self.size = dense, control, size
        self.passes, self.fractions = 0, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        mode = self.control.mode
        if mode is Mode.DRAFT:
            return self.draft(x)
        if mode is Mode.CHECK:
            return self.dense(x)
        if mode is Mode.PREFILL:
            return self.prefill(x)
        return self._score(x)

    def prefill(self, x: Tensor) -> Tensor:
        """Of a prompt: dense; a selector may look on."""
        return self.dense(x)

    @abstractmethod
    def draft(self, x: Tensor) -> Tensor:
        """With few neurons."""

    @abstractmethod
    def planned(self) -> float:
        """Fraction of its weights that a drafted token should read."""

    def read(self) -> float:
        """Fraction of its weights that a drafting pass has read, on average; what is planned before there was one."""
        return self.fractions / self.passes if self.passes else self.planned()

    def count(self, fraction: float) -> None:
        """Note what one pass has read."""
        self.passes += 1
        self.fractions += fraction

    def _score(self, x: Tensor) -> Tensor:
        first = self.control.prompt
        tokens = x.reshape(-1, x.shape[-1])  # one window, which some models flatten
        made = [self.dense(tokens[:first])] if first else []
        passes, fractions = self.passes, self.fractions
        made.append(self.draft(tokens[first:]))
        self.passes, self.fractions = passes, fractions  # many tokens at once read more than each alone
        out = torch.cat(made)
        return out.view(*x.shape[:-1], out.shape[-1])
