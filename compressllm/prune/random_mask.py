"""Random pruning: the baseline every claim is held against."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.protocols import PRUNERS
from compressllm.core.stats import InputStats
from compressllm.prune.criterion import Criterion


@PRUNERS.register("random")
@dataclass(frozen=True)
class RandomMask(Criterion):
    """Keep weights at random: the baseline every claim is held against.

    Args:
        seed: Another seed gives other masks; the recipe's unless set here.
    """

    seed: int = 0

    def score(self, weight: Tensor, stats: InputStats) -> Tensor:
        """Uniform noise, drawn anew for each weight matrix."""
        # Seeding from the matrix itself, not from a running generator, makes the mask independent of the order
        # of the linears and of where a run was resumed.
        content = hashlib.sha256(weight.cpu().contiguous().numpy().tobytes() + str(self.seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(content[:8], "little", signed=True))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
