"""Masks that tighten: from a dense model to its pattern while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compressllm.core.pattern import NM, SparsityPattern, Unstructured
from compressllm.recover.masking import Adaptive, MaskCounts, MaskedWeight


class Gradual(Adaptive):
    """More and more weights are pruned, the smallest first, and stay so; then the masks rest.

    Of an N:M pattern it is a growing share of each row's groups that is pruned, those first that lose least by it.

    Args:
        share: Step -> how much of the pattern's sparsity there is by then, 0 to 1.
        period: Steps between two prunings.
        last: Step of the last one, after which the whole pattern is there.

    Source: Zhu and Gupta, arXiv 1710.01878; groups as in a utility of AST's authors.
    """

    name = "gradual"
    apart = False

    def __init__(
        self, weights: Mapping[str, MaskedWeight], share: Callable[[int], float], period: int, last: int
    ) -> None:
        super().__init__(weights, lambda step: 0.0, period, last)
        self._share = share

    def begin_(self, weights: Mapping[str, Tensor]) -> None:
        """Keep all that the share of step 0 leaves."""
        self.refresh_(weights.__getitem__, 0)

    def clean_(self, gradients: Mapping[str, Tensor]) -> None:
        """Take what is pruned out of the gradients."""
        for name, one in self.weights.items():
            gradients[name].mul_(one.keep)

    def direction(self, name: str, momentum: Tensor, weight: Tensor, step: int) -> Tensor:
        """Mu where kept: what is pruned stays 0."""
        return momentum.mul_(self.weights[name].keep)

    def forward_weight(self, name: str, weight: Tensor, step: int) -> Tensor:
        """W, which is 0 where it is pruned."""
        return weight

    def refreshes(self, step: int) -> bool:
        """Every ``period`` steps, and at the last."""
        return (step % self._period == 0 and step <= self._last) or step == self._last

    def settled(self, step: int) -> bool:
        """From the last pruning on."""
        return step >= self._last

    def refresh_(self, weights: Callable[[str], Tensor], step: int) -> MaskCounts:
        """Prune, which also sets the weights to 0."""
        counts = super().refresh_(weights, step)
        for name, one in self.weights.items():
            weights(name).mul_(one.keep)
        return counts

    def _chosen(self, one: MaskedWeight, weight: Tensor, step: int) -> Tensor:
        share = 1.0 if step >= self._last else self._share(step)
        return one.choose(weight, lambda size: keep_share(one.pattern, size, share))


class MaskDecay(Adaptive):
    """MdGF: pruned weights are multiplied by a factor that falls to 0; gradients go to all weights.

    Args:
        factor: Step -> what the forward pass multiplies pruned weights by.
        period: Steps between two choices of the masks.
        last: Last step after which they may move.

    Source: arXiv 2402.04744, section 4.1.
    """

    name = "mask-decay"
    exact = False

    def __init__(
        self, weights: Mapping[str, MaskedWeight], factor: Callable[[int], float], period: int, last: int
    ) -> None:
        super().__init__(weights, lambda step: 0.0, period, last)
        self._factor = factor

    def direction(self, name: str, momentum: Tensor, weight: Tensor, step: int) -> Tensor:
        """Mu."""
        return momentum

    def forward_weight(self, name: str, weight: Tensor, step: int) -> Tensor:
        """W (m + (1 - m) d)."""
        return torch.where(self.weights[name].keep, weight, weight * self._factor(step))


class StructureDecay(Adaptive):
    """SdGF: hard masks of patterns that come nearer to the last one, each for as many steps; gradients go to all.

    Args:
        pattern: Pattern that training ends with, and step -> the one of that step.
        period: Steps between two choices of the masks.
        last: Last step after which they may move.

    Source: arXiv 2402.04744, section 4.2.
    """

    name = "structure-decay"

    def __init__(
        self, weights: Mapping[str, MaskedWeight], pattern: Callable[[NM, int], NM], period: int, last: int
    ) -> None:
        super().__init__(weights, lambda step: 0.0, period, last)
        self._pattern = pattern

    def begin_(self, weights: Mapping[str, Tensor]) -> None:
        """Masks of the first pattern."""
        self.refresh_(weights.__getitem__, 0)

    def direction(self, name: str, momentum: Tensor, weight: Tensor, step: int) -> Tensor:
        """Mu."""
        return momentum

    def refreshes(self, step: int) -> bool:
        """Every ``period`` steps until the masks are frozen, and where another pattern begins."""
        turns = any(self._at(one, step) != self._at(one, step - 1) for one in self.weights.values())
        return turns or super().refreshes(step)

    def settled(self, step: int) -> bool:
        """From the beginning of the last pattern on."""
        return all(self._at(one, step) == one.pattern for one in self.weights.values())

    def _chosen(self, one: MaskedWeight, weight: Tensor, step: int) -> Tensor:
        return one.choose(weight, self._at(one, step).keep)

    def _at(self, one: MaskedWeight, step: int) -> SparsityPattern:
        return self._pattern(one.pattern, step) if isinstance(one.pattern, NM) else one.pattern


def keep_share(pattern: SparsityPattern, size: Tensor, share: float) -> Tensor:
    """(out, in) sizes -> bool mask with ``share``, 0 to 1, of the pattern's sparsity."""
    if isinstance(pattern, Unstructured):
        return Unstructured(pattern.fraction * share, pattern.group).keep(size)
    keep = pattern.keep(size)
    if not isinstance(pattern, NM) or share >= 1.0:
        return keep
    lost = size.masked_fill(keep, 0.0).view(len(size), -1, pattern.m).sum(-1)
    first = lost.argsort(dim=1, stable=True)[:, : round(share * lost.shape[1])]
    dense = torch.ones_like(lost, dtype=torch.bool).scatter_(1, first, False)
    return keep | dense.repeat_interleave(pattern.m, dim=1)
