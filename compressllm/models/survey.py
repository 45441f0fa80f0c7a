"""What is in a checkpoint, linear by linear, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compressllm.core.gathered import in_order_of
from compressllm.core.pattern import SparsityPattern
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import skeleton
from compressllm.models.seal import broken_seals
from compressllm.models.tensornames import tensor_names


@dataclass(frozen=True)
class LinearSurvey:
    """One prunable linear as it lies on disk.

    Args:
        zeros: Weights equal to zero, -0.0 included.
        negative_zeros: Weights that are -0.0 at a pruned place.
        not_finite: Weights that are NaN or infinite.
        scheme: What its weights are rounded to, or None.
        pattern: The pattern it was held against, or None if there is none.
        violations: Groups with more kept weights than the pattern allows.
        outside_mask: Weights that are not zero where the stored mask says pruned.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    scheme: str | None
    zeros: int
    negative_zeros: int
    not_finite: int
    pattern: str | None
    violations: int
    outside_mask: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is zero."""
        return self.zeros / (self.shape[0] * self.shape[1])

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with it."""
        return not (self.negative_zeros or self.not_finite or self.violations or self.outside_mask)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "sparsity": self.sparsity}


def survey(checkpoint: Checkpoint, pattern: SparsityPattern | None = None) -> tuple[int, Iterator[LinearSurvey]]:
    """How many prunable linears there are, and each as it is read, one in memory at a time.

    Args:
        pattern: What to hold every linear against, in the order of inputs that it was pruned in; None takes what each
            was pruned to.
    """
    model = skeleton(checkpoint)
    stored = tensor_names(model, checkpoint)
    linears = all_linears(model)
    patterns = checkpoint.facts.patterns if checkpoint.facts else {}
    schemes = checkpoint.facts.schemes if checkpoint.facts else {}

    def rows() -> Iterator[LinearSurvey]:
        for name, linear in linears.items():
            tensor = stored[f"{name}.weight"]
            owner = tensor.removesuffix(".weight")
            weight = linear.turned(checkpoint.read(tensor))
            keep = checkpoint.mask(owner)
            recorded = patterns.get(owner)
            against = in_order_of(pattern, recorded) if pattern else recorded
            yield _survey_linear(name, weight, keep, against, schemes.get(owner))

    return len(linears), rows()


def damaged_files(checkpoint: Checkpoint, show: Callable[..., Any] = lambda items, total, label: items) -> list[str]:
    """Files whose bytes are not those that were written, by the hashes in ``SHA256SUMS`` and ``compressllm.json``."""
    return broken_seals(checkpoint.folder, checkpoint.facts.sha256 if checkpoint.facts else {}, show)


def _survey_linear(
    name: str, weight: Tensor, keep: Tensor | None, pattern: SparsityPattern | None, scheme: str | None
) -> LinearSurvey:
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.is_floating_point() and weight.dtype.itemsize == 1:
        weight = weight.float()  # exact; torch asks float8 for neither signs nor NaN
    zero = weight == 0
    pruned = zero if keep is None else ~keep
    violations = 0
    if pattern is not None:
        violations = weight.shape[0] if pattern.refuses(weight.shape) else pattern.violations(~zero)
    return LinearSurvey(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=dtype,
        scheme=scheme,
        zeros=int(zero.sum()),
        negative_zeros=int((zero & torch.signbit(weight) & pruned).sum()) if pattern or keep is not None else 0,
        not_finite=int((~weight.isfinite()).sum()),
        pattern=str(pattern) if pattern else None,
        violations=violations,
        outside_mask=0 if keep is None else int((~zero & ~keep).sum()),
    )
