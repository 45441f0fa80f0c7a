"""Cross entropy on windows that are not trained on: it chooses the best weights and tells divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressllm.recover.headchunks import IGNORED
from compressllm.recover.headloss import head_loss
from compressllm.recover.losses import LossWeights
from compressllm.recover.rows import Rows
from compressllm.recover.sharding import Sharding
from compressllm.recover.teacher import ResidentTeacher

_TEXT = LossWeights(ce=1.0)


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure on.

    Args:
        rows: Not trained on.
        sharding: How processes share them.
        micro_batch: Rows in one forward.
    """

    rows: Rows
    sharding: Sharding
    micro_batch: int

    def student_nll(self, student: nn.Module) -> float:
        """Mean cross entropy over the labels of all processes' rows, in nats."""
        return self._mean(lambda batch: student(batch, None, _TEXT, 1.0)[1]["ce"])

    def teacher_nll(self, teacher: ResidentTeacher) -> float:
        """The same of a teacher."""

        def ce(batch: Mapping[str, Tensor]) -> Tensor:
            said = teacher(batch).head
            labels = batch["labels"].flatten().to(said.hidden.device)
            return head_loss(said.hidden, said.head, labels, None, _TEXT, denominator=1.0)[1]["ce"]

        return self._mean(ce)

    @torch.no_grad()
    def _mean(self, summed_ce: Callable[[Mapping[str, Tensor]], Tensor]) -> float:
        total, count = 0.0, 0
        for batch in self._batches():
            count += count_labels(batch)
            total += float(summed_ce({key: value.to(self.sharding.device) for key, value in batch.items()}))
        total, count = self.sharding.total(torch.tensor([total, float(count)], dtype=torch.float64)).tolist()
        return float(total / max(count, 1.0))

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The share of this process. Sharded, all take part in each forward, if with a row that does not count."""
        ranks, size = self.sharding.ranks, self.micro_batch
        for start in range(0, len(self.rows), size * ranks.size):
            mine = list(range(start + ranks.rank, len(self.rows), ranks.size))[:size]
            batch = self.rows.batch(mine or [0])
            yield batch if mine else batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


def count_labels(batch: Mapping[str, Tensor]) -> int:
    """Tokens that are predicted."""
    return int((batch["labels"] != IGNORED).sum())
