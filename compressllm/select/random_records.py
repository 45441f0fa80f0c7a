"""Records at random: the baseline every choice is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compressllm.core.protocols import SELECTORS, Chosen, RecordPool
from compressllm.core.run import Run


@SELECTORS.register("random")
@dataclass(frozen=True)
class RandomRecords:
    """Records at random: the baseline every choice is held against.

    Args:
        seed: Another seed gives another choice; the command's or recipe's unless set here.
    """

    seed: int = 0
    needs_student: ClassVar[bool] = False

    def select(self, pool: RecordPool, budget: int, run: Run) -> Chosen:
        """The first ``budget`` of a shuffle."""
        order = torch.randperm(len(pool.lengths), generator=torch.Generator().manual_seed(self.seed))
        return Chosen(order[:budget].tolist(), [0.0] * budget, notes={"score": "none"})
