"""What pulls at the student: its teacher, if it has one, and how much each loss counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.core.errors import RecipeError
from compressllm.core.run import Run
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.recover.headchunks import IGNORED, Teacher
from compressllm.recover.losses import LossWeights
from compressllm.recover.packing import PackedRows, check_packing
from compressllm.recover.rows import Rows
from compressllm.recover.sharding import Sharding
from compressllm.recover.squarehead import block_outputs, check_shape, squarehead
from compressllm.recover.teacher import ResidentTeacher, open_teacher
from compressllm.recover.teachercache import TeacherCache, open_cache

#: A student's forward: (batch, teacher's answer, weights, denominator) -> the weighted losses at its head, and parts.
Forward = Callable[[Mapping[str, Tensor], Teacher | None, LossWeights, float], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Guide:
    """Losses of a batch.

    Args:
        weights: How much each loss counts.
        teacher: Answers batches; None trains on the text alone, or from the cache.
        cache: What a teacher answered earlier to the rows that are trained on.
        blocks: The student's, whose outputs SquareHead compares.
        paper_exact: SquareHead as released.
    """

    weights: LossWeights
    teacher: ResidentTeacher | None = None
    cache: TeacherCache | None = None
    blocks: Iterable[nn.Module] = ()
    paper_exact: bool = False

    def loss(
        self, student: Forward, batch: Mapping[str, Tensor], denominator: float, rows: Sequence[int] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses of one micro-batch, and each of them without its weight.

        Args:
            denominator: Labels in the whole optimizer step, over micro-batches and processes: what micro-batches
                give adds up to the step's means. SquareHead's is the mean over micro-batches by their labels.
            rows: The rows the batch is made of, which a cache is asked for.
        """
        if not (self.weights.squarehead and self.teacher):
            return student(batch, self.answer(batch, rows), self.weights, denominator)
        answer = self.teacher(batch, blocks=True)
        with block_outputs(self.blocks) as outputs:
            loss, parts = student(batch, answer.head, self.weights, denominator)
        valid = batch["labels"] != IGNORED
        part = squarehead(outputs, answer.blocks, valid, paper_exact=self.paper_exact) * (valid.sum() / denominator)
        return loss + self.weights.squarehead * part, parts | {"squarehead": part.detach()}

    def answer(self, batch: Mapping[str, Tensor], rows: Sequence[int] = ()) -> Teacher | None:
        """What the losses at the head are to compare a batch with; None if they look at the text alone."""
        if self.cache:
            return self.cache.at(rows)
        return self.teacher(batch).head if self.teacher else None


@dataclass(frozen=True)
class CacheOptions:
    """Where a teacher's answers are kept.

    Args:
        root: Folder of caches, each in a folder of its own.
        k: Tokens kept a position.
    """

    root: Path
    k: int = 64


def make_guide(
    weights: LossWeights,
    teacher: str | None,
    bundle: Bundle,
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    paper_exact: bool = False,
    cached: CacheOptions | None = None,
    rows: Rows | None = None,
    run: Run | None = None,
    sharding: Sharding | None = None,
) -> Guide:
    """A guide with the teacher loaded, or its answers opened, if the losses look at one.

    Args:
        teacher: The dense model, anything `resolve_model` takes.
        bundle: The student's.
        model: The student with its weights, as it is trained.
        device: The teacher's.
        dtype: Of the teacher's weights.
        cached: Have the teacher answer ``rows`` once, beforehand. The dtype is then the cache maker's.
        rows: What is trained on.
        sharding: How processes share the teacher, unless its answers are cached: the first then makes them alone.

    Raises: RecipeError for a teacher that is missing, of another vocabulary, or, with SquareHead, of another shape or
        cached; UnsupportedModelError for one in which packed records see each other; what `open_cache` raises.
    """
    if not weights.need_teacher:
        return Guide(weights)
    if teacher is None:
        raise RecipeError(f"losses {weights}: need a teacher; give the dense model as --teacher, or use ce=1.0 alone")
    opened = open_teacher(teacher, bundle)
    if weights.squarehead:
        if cached:
            raise RecipeError("squarehead: compares block outputs, which are not cached; take kl, or no teacher cache")
        check_shape(model, opened.model)
    load = partial(_load, opened, device, dtype, isinstance(rows, PackedRows))
    if cached and rows is not None:
        run = run or Run()
        cache = open_cache(cached.root, opened, rows, load, run, k=cached.k)
        run.metrics["teacher_cache"] = {name: cache.facts[name] for name in ("k", "captured_mass")}
        return Guide(weights, cache=cache)
    return Guide(weights, load(sharding), None, find_blocks(model).modules, paper_exact)


def _load(
    bundle: Bundle, device: torch.device, dtype: torch.dtype, packed: bool, sharding: Sharding | None = None
) -> ResidentTeacher:
    teacher = ResidentTeacher(bundle, device, dtype, sharding)
    if packed:
        check_packing(teacher.model)
    return teacher
