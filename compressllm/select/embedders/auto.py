"""The best embedder that can be used here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.protocols import EMBEDDERS
from compressllm.core.run import Run
from compressllm.select.embedders.hidden import Hidden
from compressllm.select.embedders.minilm import MiniLM


@EMBEDDERS.register("auto")
@dataclass(frozen=True)
class Auto:
    """minilm where it is installed, or else hidden; the latter is warned of."""

    def refuses(self) -> str | None:
        """Nothing."""
        return None

    def embed(
        self, texts: Sequence[str], hidden: Callable[[Sequence[str]], Tensor], device: torch.device, run: Run
    ) -> Tensor:
        """(n, d) float32 of unit rows."""
        minilm = MiniLM()
        if reason := minilm.refuses():
            run.warn(f"embedder minilm {reason}; the dense model's hidden states are used instead")
            return Hidden().embed(texts, hidden, device, run)
        return minilm.embed(texts, hidden, device, run)
