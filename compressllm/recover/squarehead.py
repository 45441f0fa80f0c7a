"""SquareHead: the student's block outputs are drawn to the teacher's, relative to how large those are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from compressllm.core.errors import RecipeError, UnsupportedModelError
from compressllm.models.blocks import find_blocks

_EPS: Final = 1e-6
_PAPER_EPS: Final = 0.0078125  # bfloat16's, as released: it swallows blocks whose mean square is below 1e-2


def squarehead(
    student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Tensor, *, paper_exact: bool = False
) -> Tensor:
    """Mean over blocks of mean((s - t)^2) / (mean(t^2) + eps), a scalar in float32.

    The means are over valid tokens and hidden dimensions, so a block's scale does not count, nor does the depth.

    Args:
        student: (B, S, d) output of each block, front to back, not normalised.
        teacher: Likewise. Not changed, and no gradient goes there.
        valid: (B, S) bool, the tokens that count.
        paper_exact: The sum over blocks instead of the mean, with the eps of the released code.

    Source: Kurtic et al., Sparse Fine-tuning for Inference Acceleration of LLMs, arXiv 2310.06927, equation 1; the mean
    over blocks and a smaller eps are ours.

    Raises: RecipeError if the two are of different depth or width.
    """
    check_depth(len(student), len(teacher))
    total = torch.zeros((), device=valid.device)
    everything = bool(valid.all())
    for s, t in zip(student, teacher, strict=True):
        if s.shape != t.shape:
            raise RecipeError(f"squarehead: {_WIDTH.format(s.shape[-1], t.shape[-1])}")
        t = t.to(s.device)
        if not everything:
            s, t = s[valid], t[valid]
        if not t.numel():
            return total + 0.0 * sum(one.sum() for one in student)  # nothing counts, and every output has its gradient
        t = t.float()
        size = torch.linalg.vector_norm(t) ** 2 / t.numel()
        total = total + F.mse_loss(s.float(), t) / (size + (_PAPER_EPS if paper_exact else _EPS))
    return total if paper_exact else total / len(student)


_WIDTH: Final = "the student is {} wide, the teacher {}; take a teacher of the same shape, or kl"


def check_depth(student: int, teacher: int) -> None:
    """Refuse a teacher with another number of blocks. Raises RecipeError."""
    if student != teacher:
        raise RecipeError(
            f"squarehead: the student has {student} blocks, the teacher {teacher}; "
            "take a teacher of the same shape, or kl"
        )


def check_shape(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher of another depth or width, before anything is computed. Raises RecipeError."""
    check_depth(len(find_blocks(student).modules), len(find_blocks(teacher).modules))
    widths = [int(model.config.get_text_config().hidden_size) for model in (student, teacher)]
    if widths[0] != widths[1]:
        raise RecipeError(f"squarehead: {_WIDTH.format(*widths)}")


@contextmanager
def block_outputs(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Keep what each block puts out in the forwards within, front to back.

    Raises: UnsupportedModelError if an output has no graph where it needs one: re-entrant activation checkpointing
        cuts it off, and a loss on it would train nothing.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if trained and not hidden.requires_grad:
            raise UnsupportedModelError(
                "squarehead: a block's output has no gradient; use checkpoints without re-entry"
            )
        outputs.append(hidden)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
