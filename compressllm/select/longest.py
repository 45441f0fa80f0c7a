"""The records with the longest responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compressllm.core.protocols import SELECTORS, Chosen, RecordPool
from compressllm.core.run import Run


@SELECTORS.register("longest")
@dataclass(frozen=True)
class Longest:
    """The records with the longest responses: a baseline that needs no model and is hard to beat.

    Source: Zhao et al., Long is more for alignment, ICML 2024.
    """

    needs_student: ClassVar[bool] = False

    def select(self, pool: RecordPool, budget: int, run: Run) -> Chosen:
        """Longest first; of equally long ones the earlier."""
        order = pool.response_lengths.argsort(descending=True, stable=True)[:budget]
        scores = [float(length) for length in pool.response_lengths[order].tolist()]
        return Chosen(order.tolist(), scores, notes={"score": "response tokens"})
