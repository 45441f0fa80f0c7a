"""How masks and training go together: masks that stay, and masks that move while pruned weights decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from compressllm.core.pattern import SparsityPattern


@dataclass
class MaskedWeight:
    """One weight under a mask: the whole of it, or the rows of it that this process holds.

    Args:
        keep: Bool, True = kept; of the shape of the parameter, which may be the (in, out) transpose of the weight.
        pattern: What the mask has to obey.
        transposed: Whether it is that transpose.
        first: The mask that training began with, for the flip rate; only where masks move.
    """

    keep: Tensor
    pattern: SparsityPattern
    transposed: bool = False
    first: Tensor | None = None

    def choose(self, weight: Tensor, choice: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The mask of the largest weights, of the parameter's shape.

        Args:
            choice: From (out, in) sizes to the mask; the pattern's unless given.
        """
        choice, size = choice or self.pattern.keep, weight.abs()
        return choice(size.T).T.contiguous() if self.transposed else choice(size)


@dataclass(frozen=True)
class MaskCounts:
    """What masks and weights came to at a refresh: sums over the weights of this process.

    ``kept`` and ``masked`` are sums of |W|. Masked weights that shrink while kept ones hold show that decay acts.
    """

    weights: int = 0
    kept_weights: int = 0
    flipped: int = 0
    flipped_from_first: int = 0
    kept: float = 0.0
    masked: float = 0.0
    masked_max: float = 0.0

    def __add__(self, other: MaskCounts) -> MaskCounts:
        return MaskCounts(
            self.weights + other.weights,
            self.kept_weights + other.kept_weights,
            self.flipped + other.flipped,
            self.flipped_from_first + other.flipped_from_first,
            self.kept + other.kept,
            self.masked + other.masked,
            max(self.masked_max, other.masked_max),
        )

    def metrics(self) -> dict[str, float]:
        """As `metrics.jsonl` has it."""
        masked_weights = max(1, self.weights - self.kept_weights)
        return {
            "flip_rate": self.flipped / max(1, self.weights),
            "flip_rate_from_first": self.flipped_from_first / max(1, self.weights),
            "kept_mean": self.kept / max(1, self.kept_weights),
            "masked_mean": self.masked / masked_weights,
            "masked_max": self.masked_max,
        }


class Masking:
    """Masks that stay: gradients are cleaned before they are clipped, and a pruned weight is 0.0 at every step.

    Args:
        weights: Parameter name -> its mask. Keyed by name: what is hung on a parameter is lost when it is sharded.
    """

    name: str = "fixed"
    moves = False
    """Whether the pruned weights live on, and the optimizer asks for `direction`."""
    apart = False
    """Whether the forward pass uses another tensor than the optimizer's, of a weight that is float32 too."""
    exact = True
    """Whether the forward pass uses, at every step, what the result would be were it the last."""
    scales = 0
    """Equal parts of each row of a weight that get a learnt scale."""

    def __init__(self, weights: Mapping[str, MaskedWeight]) -> None:
        self.weights = dict(weights)

    def clean_(self, gradients: Mapping[str, Tensor]) -> None:
        """Take from the gradients, in place, what may not count in their norm."""
        for name, one in self.weights.items():
            gradients[name].mul_(one.keep)

    def direction(self, name: str, momentum: Tensor, weight: Tensor, step: int) -> Tensor:
        """What Adam divides by its root mean square: momentum, corrected for its bias, and the decay of pruned weights.

        May overwrite ``momentum``.
        """
        raise NotImplementedError

    def forward_weight(self, name: str, weight: Tensor, step: int) -> Tensor:
        """What the forward pass uses in place of the optimizer's ``weight`` once ``step`` steps are done."""
        return weight

    def begin_(self, weights: Mapping[str, Tensor]) -> None:
        """Put the masks of step 0 in place, where they are others than those that training is to end near."""

    def settled(self, step: int) -> bool:
        """Whether what ``step`` steps leave obeys the patterns, so that it may be the result."""
        return True

    def refreshes(self, step: int) -> bool:
        """Whether masks are chosen anew once ``step`` (from 1) is done."""
        return False

    def refresh_(self, weights: Callable[[str], Tensor], step: int) -> MaskCounts:
        """Choose the masks anew, in place, once ``step`` steps are done.

        Args:
            weights: Name -> the optimizer's weight, its scales multiplied in.
        """
        total = MaskCounts()
        for name, one in self.weights.items():
            weight = weights(name)
            total += _replace_(one, weight, self._chosen(one, weight, step))
        return total

    def _chosen(self, one: MaskedWeight, weight: Tensor, step: int) -> Tensor:
        """The mask that a weight has from now on."""
        return one.choose(weight)


#: What the released GPT-2 trainer of AST multiplies decay by: the bitwise complement of an int32 mask is -1 where
#: pruned and -2 where kept, so that weights grow, kept ones twice as fast.
REVERSED: Final = (-1.0, -2.0)


class Adaptive(Masking):
    """AST: the forward uses m * W, its gradient goes to all of W, and pruned weights decay until they return or stay.

    Decay is added to Adam's first moment where it is used, not where it is kept, and counts in the second:
    u = mu + lambda(t) (1 - m) W.

    Args:
        decay: Step, from 0 -> lambda.
        period: Steps between two choices of the masks.
        last: Last step, from 1, after which masks may move.
        reversed_sign: Decay as the authors' released trainer computes it, see `REVERSED`; an experiment.

    Source: AST, arXiv 2407.20584, section 3.
    """

    name = "ast"
    moves = apart = True

    def __init__(
        self,
        weights: Mapping[str, MaskedWeight],
        decay: Callable[[int], float],
        period: int,
        last: int,
        reversed_sign: bool = False,
    ) -> None:
        super().__init__(weights)
        self._decay, self._period, self._last, self._reversed = decay, period, last, reversed_sign
        for one in self.weights.values():
            one.first = one.keep.clone()

    def clean_(self, gradients: Mapping[str, Tensor]) -> None:
        """Leave the gradients: they go to all weights."""

    def direction(self, name: str, momentum: Tensor, weight: Tensor, step: int) -> Tensor:
        """U = mu + lambda (1 - m) W."""
        keep, strength = self.weights[name].keep, self._decay(step)
        if self._reversed:
            pruned, kept = REVERSED
            return momentum.addcmul_(weight, torch.where(keep, kept * strength, pruned * strength))
        return momentum.add_(weight.masked_fill(keep, 0.0), alpha=strength)

    def forward_weight(self, name: str, weight: Tensor, step: int) -> Tensor:
        """M * W."""
        return weight * self.weights[name].keep

    def refreshes(self, step: int) -> bool:
        """Every ``period`` steps until masks are frozen."""
        return step % self._period == 0 and step <= self._last


def _replace_(one: MaskedWeight, weight: Tensor, keep: Tensor) -> MaskCounts:
    before, one.keep = one.keep, keep
    size = weight.abs()
    kept_weights, kept = int(one.keep.count_nonzero()), float(torch.where(one.keep, size, 0.0).sum())
    size.masked_fill_(one.keep, 0.0)
    first = before if one.first is None else one.first
    return MaskCounts(
        weights=weight.numel(),
        kept_weights=kept_weights,
        flipped=int((one.keep != before).count_nonzero()),
        flipped_from_first=int((one.keep != first).count_nonzero()),
        kept=kept,
        masked=float(size.sum()),
        masked_max=float(size.max()) if size.numel() else 0.0,
    )
