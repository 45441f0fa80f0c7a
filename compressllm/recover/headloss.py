"""Cross entropy and distillation at the output head: full logits never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compressllm.core.errors import RecipeError
from compressllm.recover.head import Head, bf16_products
from compressllm.recover.headchunks import HeadTask, Teacher, TeacherHidden, sum_over_chunks
from compressllm.recover.losses import LossWeights


def head_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Teacher | None,
    weights: LossWeights,
    temperature: float = 1.0,
    chunk: int | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses at the head, and each of them without its weight.

    Each is a sum over the positions that have a label, over ``denominator``; the divergences times T^2. All are
    scalars in float32 (float64 of float64 input). The loss has a graph that serves one backward pass: gradients are
    computed along with it, chunk by chunk, so that only a few buffers of ``chunk`` x V logits are ever alive. Losses
    without a weight are told where they cost nothing.

    Args:
        hidden: (T, d) what the student's head is given.
        labels: (T,) the token that follows each position, `IGNORED` where there is none to predict.
        teacher: What kl and reverse_kl compare with, at the same positions.
        weights: squarehead is not looked at.
        chunk: Tokens at a time; None takes what fits buffers of moderate size.
        denominator: Positions with a label in the whole optimizer step, over micro-batches and processes; None
            takes those of this call.

    Raises: RecipeError if there is no teacher to distil from, or one of another vocabulary.
    """
    if (weights.kl or weights.reverse_kl) and teacher is None:
        raise RecipeError(f"losses {weights}: distillation needs a teacher; give one, or use ce=1.0 alone")
    if isinstance(teacher, TeacherHidden) and teacher.head.vocab_size != head.vocab_size:
        raise RecipeError(
            f"the teacher's head has {teacher.head.vocab_size} tokens, the student's {head.vocab_size}; "
            "give a teacher of the same vocabulary"
        )
    if not (weights.kl or weights.reverse_kl):
        teacher = None
    inputs = (hidden, head.weight, head.bias)
    graph = weights.at_head and torch.is_grad_enabled()
    wanted = [graph and x is not None and x.requires_grad for x in inputs]
    factors = [hidden, head.weight]
    if isinstance(teacher, TeacherHidden):
        factors += [teacher.hidden, teacher.head.weight]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), bf16_products(*factors):
        task = HeadTask(hidden, head, labels, teacher, weights, temperature, chunk)
        totals, gradients = sum_over_chunks(task, wanted)
        count = task.count if denominator is None else denominator
        scale = 1.0 / torch.as_tensor(count, dtype=task.wide, device=hidden.device).clamp_min(1.0)
        parts = {name: total * scale for name, total in totals.items()}
        loss = torch.zeros((), dtype=task.wide, device=hidden.device)
        for name, part in parts.items():
            loss += getattr(weights, name) * part
    if any(wanted):
        loss = _Known.apply(loss, scale, gradients, *inputs)  # type: ignore[no-untyped-call]
    return loss, parts


class _Known(torch.autograd.Function):
    """A loss whose gradients by its inputs are known, up to a scale; one backward pass hands them on."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, scale: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.scale, ctx.gradients = scale, gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("head_loss: its gradients were handed on already; call it again for a second backward")
        gradients, ctx.gradients = ctx.gradients, None
        factor = incoming * ctx.scale
        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, None, *scaled
