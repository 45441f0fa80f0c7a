"""KL divergences between two sets of logits with their gradients, in as few passes over memory as they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Divergence:
    """What `divergence_` finds.

    Args:
        losses: (n,) values for each token: ``kl``, and ``reverse_kl`` if it has a weight.
        log_sum: (n,) log of the sum of the exponentials of the student's logits.
        gradient: (n, V) of the weighted sum, by the student's logits.
    """

    losses: dict[str, Tensor]
    log_sum: Tensor
    gradient: Tensor


def divergence_(
    student: Tensor, teacher: Tensor, spare: Sequence[Tensor], kl: float, reverse_kl: float, extra: float = 0.0
) -> Divergence:
    """Divergences of (n, V) logits. Destroys ``teacher``, where the gradient then lies, and ``spare``.

    Both are exactly 0 where the logits are equal.

    Args:
        spare: One buffer like the logits, or two if ``reverse_kl`` is not 0.
        kl: Weight of KL(teacher || student).
        reverse_kl: Weight of KL(student || teacher).
        extra: What to add to the gradient times the student's probabilities: the greater part of cross entropy's.
    """
    p = torch.softmax(teacher, -1, out=spare[0])
    teacher_sum = log_sum(teacher, p)
    cross = row_dot(p, teacher) - row_dot(p, student) - teacher_sum
    if not reverse_kl:
        q = torch.softmax(student, -1, out=teacher)  # the teacher's logits are not needed any more
        student_sum = log_sum(student, q)
        gradient = _scaled_(q, kl + extra).sub_(p, alpha=kl)
        return Divergence({"kl": cross + student_sum}, student_sum, gradient)
    q = torch.softmax(student, -1, out=spare[1])
    student_sum = log_sum(student, q)
    ratio = torch.sub(student, teacher, out=teacher).sub_((student_sum - teacher_sum).unsqueeze(1))  # log q - log p
    reverse = row_dot(q, ratio)
    gradient = ratio.sub_(reverse.unsqueeze(1)).mul_(q).mul_(reverse_kl).add_(q, alpha=kl + extra).sub_(p, alpha=kl)
    return Divergence({"kl": cross + student_sum, "reverse_kl": reverse}, student_sum, gradient)


def log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """(n,) log-sum-exp of logits whose softmax is known: two passes that only read."""
    return logits.amax(-1) - probabilities.amax(-1).log()


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """(n, V) x (n, V) -> (n,); on a CPU without the products in memory.

    A matrix product may be set to round its inputs, and what `divergence_` makes of the dots is a difference.
    """
    on_cpu = a.device.type == "cpu"
    return torch.stack([x.dot(y) for x, y in zip(a, b, strict=True)]) if on_cpu else (a * b).sum(-1)


def _scaled_(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.mul_(factor)
