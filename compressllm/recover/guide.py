"""What pulls at the student: its teacher, if it has one, and how much each loss counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.core.errors import RecipeError
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.recover.headchunks import IGNORED, Teacher
from compressllm.recover.losses import LossWeights
from compressllm.recover.squarehead import block_outputs, check_shape, squarehead
from compressllm.recover.teacher import ResidentTeacher, open_teacher

#: A student's forward: (batch, teacher's answer, weights, denominator) -> the weighted losses at its head, and parts.
Forward = Callable[[Mapping[str, Tensor], Teacher | None, LossWeights, float], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Guide:
    """Losses of a batch.

    Args:
        weights: How much each loss counts.
        teacher: Answers batches; None trains on the text alone.
        blocks: The student's, whose outputs SquareHead compares.
        paper_exact: SquareHead as released.
    """

    weights: LossWeights
    teacher: ResidentTeacher | None = None
    blocks: Iterable[nn.Module] = ()
    paper_exact: bool = False

    def loss(
        self, student: Forward, batch: Mapping[str, Tensor], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses of one micro-batch, and each of them without its weight.

        Args:
            denominator: Labels in the whole optimizer step, over micro-batches and processes: what micro-batches
                give adds up to the step's means. SquareHead's is the mean over micro-batches by their labels.
        """
        compares = bool(self.weights.squarehead)
        answer = self.teacher(batch, blocks=compares) if self.teacher else None
        head = answer.head if answer else None
        if not (compares and answer):
            return student(batch, head, self.weights, denominator)
        with block_outputs(self.blocks) as outputs:
            loss, parts = student(batch, head, self.weights, denominator)
        valid = batch["labels"] != IGNORED
        part = squarehead(outputs, answer.blocks, valid, paper_exact=self.paper_exact) * (valid.sum() / denominator)
        return loss + self.weights.squarehead * part, parts | {"squarehead": part.detach()}


def make_guide(
    weights: LossWeights,
    teacher: str | None,
    bundle: Bundle,
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    paper_exact: bool = False,
) -> Guide:
    """A guide with the teacher loaded, if the losses look at one.

    Args:
        teacher: The dense model, anything `resolve_model` takes.
        bundle: The student's.
        model: The student with its weights, as it is trained.
        device: The teacher's.
        dtype: Of the teacher's weights.

    Raises: RecipeError for a teacher that is missing, of another vocabulary, or, with SquareHead, of another shape.
    """
    if not weights.need_teacher:
        return Guide(weights)
    if teacher is None:
        raise RecipeError(f"losses {weights}: need a teacher; give the dense model as --teacher, or use ce=1.0 alone")
    opened = open_teacher(teacher, bundle)
    if weights.squarehead:
        check_shape(model, opened.model)
    return Guide(weights, ResidentTeacher(opened, device, dtype), find_blocks(model).modules, paper_exact)
