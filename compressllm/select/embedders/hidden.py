"""The dense model's own hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.protocols import EMBEDDERS
from compressllm.core.run import Run


@EMBEDDERS.register("hidden")
@dataclass(frozen=True)
class Hidden:
    """Mean last hidden states of the dense model, less their mean over all texts; nothing to install.

    A language model's hidden states share a few large directions, so that without taking off the mean any two texts
    would look alike.
    """

    def refuses(self) -> str | None:
        """Nothing."""
        return None

    def embed(
        self, texts: Sequence[str], hidden: Callable[[Sequence[str]], Tensor], device: torch.device, run: Run
    ) -> Tensor:
        """(n, hidden size) float32 of unit rows."""
        states = hidden(texts)
        return functional.normalize(states - states.mean(dim=0))
