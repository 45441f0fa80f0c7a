"""Forward and backward of a step's micro-batches on a CPU, each on a core of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from compressllm.core.parallel import map_batches
from compressllm.recover.gradients import Gradients
from compressllm.recover.guide import Guide
from compressllm.recover.head import rounds_products
from compressllm.recover.headchunks import Teacher
from compressllm.recover.student import Student

T = TypeVar("T")

#: Rows of what is trained on, and what they hold.
MicroBatch = tuple[Sequence[int], Mapping[str, Tensor]]


def can_run_apart(guide: Guide, gradients: Gradients, batches: Sequence[MicroBatch]) -> bool:
    """Whether micro-batches on a CPU can run at once: each core gets one, and memory has room for their gradients.

    SquareHead cannot: it listens to what modules give, and would hear all of them.
    """
    cores = torch.get_num_threads()
    return not guide.weights.squarehead and 1 < cores <= len(batches) and gradients.fit(cores + 1)


def run_apart(
    student: Student, guide: Guide, gradients: Gradients, batches: Sequence[MicroBatch], labels: float
) -> Iterator[dict[str, Tensor]]:
    """The losses of each micro-batch in turn, whose gradients are added to the sums in that order.

    That keeps cores busy where operators split over them wait for each other. At the head, products may have to be
    rounded by a setting of the whole process, and then no other thread may multiply: all cores share those.

    Args:
        labels: How many the whole step has, see `Guide.loss`.
    """
    cores = torch.get_num_threads()
    for start in range(0, len(batches), cores):
        yield from _run_group(student, guide, gradients, batches[start : start + cores], labels)


def _run_group(
    student: Student, guide: Guide, gradients: Gradients, group: Sequence[MicroBatch], labels: float
) -> Iterator[dict[str, Tensor]]:
    def below(index: int) -> tuple[Tensor, Teacher | None]:
        rows, batch = group[index]
        return student.hidden(batch), guide.answer(batch, rows)

    def at_head(index: int) -> tuple[Tensor, dict[str, Tensor]]:
        state, answer = states[index]
        return student.at_head(state, group[index][1]["labels"], answer, guide.weights, labels)

    states = _apart(below, len(group))
    together = rounds_products(states[0][0])
    losses = [at_head(index) for index in range(len(group))] if together else _apart(at_head, len(group))
    states.clear()
    found = _apart(lambda index: gradients.of(losses[index][0]), len(group))
    for (loss, parts), one in zip(losses, found, strict=True):
        gradients.add_(one)
        yield {"loss": loss.detach(), **parts}


def _apart(work: Callable[[int], T], count: int) -> list[T]:
    return list(map_batches(work, count, torch.device("cpu"), first_alone=False))
