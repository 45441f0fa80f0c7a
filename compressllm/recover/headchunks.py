"""The losses at the output head, summed chunk by chunk of tokens, with their gradients in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from compressllm.recover.divergence import divergence_, log_sum
from compressllm.recover.head import Head, product, product_dtype, rounds_products
from compressllm.recover.losses import LossWeights

#: Label of a position at which nothing is to be predicted.
IGNORED: Final = -100
#: Most logits in one buffer: 128 MiB of float32, or 512 on CUDA, where a launch costs more than memory does.
_BUFFER: Final = {"cpu": 1 << 25, "cuda": 1 << 27}


@dataclass(frozen=True, eq=False)
class TeacherHidden:
    """A teacher's (T, d') hidden states and the head that makes logits of them, on any one device."""

    hidden: Tensor
    head: Head

    def at(self, positions: Tensor) -> TeacherHidden:
        """The same at some positions, in the dtype of the head's weight."""
        rows = self.hidden[positions.to(self.hidden.device)]
        return TeacherHidden(rows.to(self.head.weight.dtype), self.head)


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """A teacher's most likely next tokens at temperature 1, and all others in one bucket.

    Distributions are then compared as K + 1 probabilities, which never differ by more than the whole ones. Another
    temperature is applied to those K + 1.

    Args:
        ids: (T, K) integers, distinct in a row.
        logprobs: (T, K).
        tail: (T,) log of the mass of all other tokens.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def at(self, positions: Tensor) -> TeacherTopK:
        """The same at some positions, on their device."""
        at = positions.to(self.ids.device)
        ids, logprobs, tail = (x[at].to(positions.device) for x in (self.ids, self.logprobs, self.tail))
        return TeacherTopK(ids.long(), logprobs, tail)


Teacher = TeacherHidden | TeacherTopK


class HeadTask:
    """What is to be summed. The arguments are `head_loss`'s; ``wide`` is the dtype of logits and sums."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        teacher: Teacher | None,
        weights: LossWeights,
        temperature: float,
        chunk: int | None,
    ) -> None:
        self.dtype = product_dtype(hidden.dtype, hidden.device)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.hidden, self.labels = hidden.detach(), labels
        self.head, self.teacher = head.prepared(self.dtype), teacher
        # A CPU whose units take bfloat16 gives products in it, which is what these gradients are rounded to anyway.
        self.rounds = rounds_products(hidden, head.weight)
        self.factors = (self.hidden, head.weight.detach()) if self.rounds else (self.hidden, self.head.weight)
        self.weights, self.temperature = weights, temperature
        self.positions = (labels != IGNORED).nonzero().squeeze(1)
        self.count = len(self.positions)
        most = chunk or _BUFFER.get(hidden.device.type, _BUFFER["cpu"]) // head.vocab_size
        self.rows = min(max(1, most), self.count)
        if isinstance(teacher, TeacherHidden):
            dtype = product_dtype(teacher.hidden.dtype, teacher.hidden.device)
            self.teacher = TeacherHidden(teacher.hidden.detach(), teacher.head.prepared(dtype))

    def buffers(self) -> list[Tensor]:
        """Room for one chunk of logits, as often as its losses need; made once, since fresh memory is slow."""
        count = 3 + bool(self.weights.reverse_kl) if isinstance(self.teacher, TeacherHidden) else 2
        shape = (self.rows, self.head.vocab_size)
        return [torch.empty(shape, dtype=self.wide, device=self.hidden.device) for _ in range(count)]


def sum_over_chunks(task: HeadTask, wanted: Sequence[bool]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Each loss summed over tokens; the weighted sum's gradients by hidden states, weight and bias, where wanted."""
    totals = {name: task.hidden.new_zeros((), dtype=task.wide) for name in _told(task)}
    shapes = (task.hidden.shape, task.head.weight.shape, (task.head.vocab_size,))
    gradients = [
        torch.zeros(shape, dtype=task.wide, device=task.hidden.device) if want else None
        for shape, want in zip(shapes, wanted, strict=True)
    ]
    buffers = task.buffers()
    for positions in torch.split(task.positions, max(1, task.rows)) if task.count else ():
        states = task.hidden[positions].to(task.dtype)
        student, *spare = (buffer[: len(positions)] for buffer in buffers)
        losses, gradient = _chunk(task, states, student, spare, positions)
        for name, values in losses.items():
            totals[name] += values.sum()
        if task.head.softcap:  # d tanh(x) = 1 - tanh(x)^2
            gradient.mul_(student.div_(task.head.softcap).square_().neg_().add_(1.0))
        _add_(task, gradients, gradient, positions)
    return totals, gradients


def _told(task: HeadTask) -> list[str]:
    """The losses that `_chunk` gives: those with a weight, and those that come along with them."""
    whole = isinstance(task.teacher, TeacherHidden)
    told = {
        "ce": bool(task.weights.ce) or not whole or task.temperature == 1.0,
        "kl": task.teacher is not None,
        "reverse_kl": task.teacher is not None and bool(task.weights.reverse_kl),
    }
    return [name for name, given in told.items() if given]


def _chunk(
    task: HeadTask, states: Tensor, student: Tensor, spare: Sequence[Tensor], positions: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of each token of a chunk and the gradient by its logits at temperature 1, which ``student`` then holds."""
    labels = task.labels[positions].unsqueeze(1)
    if task.teacher is None:
        return _cross_entropy(task, task.head.logits_(states, student), spare[0], labels)
    if isinstance(task.teacher, TeacherTopK):
        task.head.logits_(states, student)
        return _top_k(task, student, task.teacher.at(positions), spare[0], labels)
    task.head.logits_(states, student, task.temperature)
    return _whole(task, student, task.teacher.at(positions), spare, labels)


def _cross_entropy(task: HeadTask, student: Tensor, spare: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    q = torch.softmax(student, -1, out=spare)
    losses = {"ce": log_sum(student, q) - student.gather(1, labels).squeeze(1)}
    return losses, _minus_labels_(q.mul_(task.weights.ce), labels, task.weights.ce)


def _whole(
    task: HeadTask, student: Tensor, teacher: TeacherHidden, spare: Sequence[Tensor], labels: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    weights, t = task.weights, task.temperature
    target = teacher.head.logits_(teacher.hidden, spare[0], t)
    # T^2 from the loss times 1/T from its logits
    found = divergence_(student, target, spare[1:], weights.kl * t, weights.reverse_kl * t, weights.ce * (t == 1.0))
    losses = {name: value * t**2 for name, value in found.losses.items()}
    if t == 1.0:
        losses["ce"] = found.log_sum - student.gather(1, labels).squeeze(1)
    else:
        student.mul_(t)
        if weights.ce:
            q = torch.softmax(student, -1, out=spare[1])
            losses["ce"] = log_sum(student, q) - student.gather(1, labels).squeeze(1)
            found.gradient.add_(q, alpha=weights.ce)
    return losses, _minus_labels_(found.gradient, labels, weights.ce)


def _top_k(
    task: HeadTask, student: Tensor, teacher: TeacherTopK, spare: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    weights, t = task.weights, task.temperature
    at_label = student.gather(1, labels).squeeze(1)
    top = student.gather(1, teacher.ids)
    student.scatter_(1, teacher.ids, -torch.inf)
    q = torch.softmax(student, -1, out=spare)  # of the tail alone
    buckets = torch.cat([top, log_sum(student, q).unsqueeze(1)], 1)  # (n, K + 1)
    student.scatter_(1, teacher.ids, top)
    coarse = buckets.log_softmax(1)
    target = torch.cat([teacher.logprobs, teacher.tail.unsqueeze(1)], 1).to(task.wide) / t
    scratch = (torch.empty_like(target), torch.empty_like(target))
    found = divergence_(coarse / t, target, scratch, weights.kl * t, weights.reverse_kl * t)
    losses = {name: value * t**2 for name, value in found.losses.items()}
    losses["ce"] = buckets.logsumexp(1) - at_label
    by_bucket = found.gradient.add_(coarse.exp_(), alpha=weights.ce)
    gradient = q.mul_(by_bucket[:, -1:]).scatter_(1, teacher.ids, by_bucket[:, :-1])
    return losses, _minus_labels_(gradient, labels, weights.ce)


def _minus_labels_(gradient: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Take ``weight`` from each row's label: what cross entropy's gradient has beside the probabilities."""
    return gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -weight)) if weight else gradient


def _add_(task: HeadTask, gradients: Sequence[Tensor | None], by_logits: Tensor, positions: Tensor) -> None:
    """Add a chunk's gradients by hidden states, weight and bias to their sums, in place."""
    by_hidden, by_weight, by_bias = gradients
    if by_bias is not None:
        by_bias.add_(by_logits.sum(0), alpha=task.head.scale)
    if by_hidden is None and by_weight is None:
        return
    if task.head.scale != 1.0:
        by_logits.mul_(task.head.scale)
    hidden, weight = task.factors
    narrow = by_logits.to(weight.dtype)
    states = hidden[positions].to(weight.dtype)
    out = weight.dtype if task.rounds else task.wide
    if by_hidden is not None:
        by_hidden[positions] = product(narrow, weight, narrow.new_empty(states.shape, dtype=out)).to(by_hidden.dtype)
    if by_weight is not None:
        if narrow.dtype == by_weight.dtype:
            by_weight.addmm_(narrow.t(), states)
        else:
            by_weight.add_(product(narrow.t(), states, torch.empty_like(by_weight, dtype=out)))
