"""The records on which the pruned model's predictions are farthest from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compressllm.core.protocols import SELECTORS, Chosen, RecordPool
from compressllm.core.run import Run


@SELECTORS.register("kd-gap")
@dataclass(frozen=True)
class KdGap:
    """The records on which distillation has most to do: largest KL(dense || pruned) a response token.

    All of the pool goes through both models.
    """

    needs_student: ClassVar[bool] = True

    def select(self, pool: RecordPool, budget: int, run: Run) -> Chosen:
        """Largest first; of equal ones the earlier."""
        gap = pool.divergence(range(len(pool.lengths)))[:, 1]
        order = gap.argsort(descending=True, stable=True)[:budget]
        notes = {"score": "KL(dense || pruned), nats a response token", "mean_of_all": float(gap.mean())}
        return Chosen(order.tolist(), gap[order].tolist(), notes=notes)
