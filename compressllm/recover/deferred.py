"""CAST: masks that act in the optimizer alone, until the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressllm.recover.masking import Adaptive, MaskedWeight


class Deferred(Adaptive):
    """CAST: the forward is dense; sparsity comes from the optimizer, whose decay takes over from the gradient.

    On pruned weights u = (1 - a) mu + a lambda sign(W), where a rises from 0 to 1 over training.

    Args:
        steps: All steps of the run.
        scales: Equal parts of each row with a learnt scale, which the weight is multiplied by; 0 for none.

    Source: CAST, arXiv 2509.25996.
    """

    name = "deferred"
    apart = exact = False

    def __init__(
        self,
        weights: Mapping[str, MaskedWeight],
        strength: float,
        steps: int,
        period: int,
        last: int,
        scales: int = 0,
    ) -> None:
        super().__init__(weights, lambda step: strength, period, last)
        self._steps, self.scales, self.apart = steps, scales, scales > 0

    def direction(self, name: str, momentum: Tensor, weight: Tensor, step: int) -> Tensor:
        """Mu where kept, (1 - a) mu + a lambda sign(W) where pruned."""
        share = step / self._steps
        decayed = weight.sign().mul_(share * self._decay(step)).add_(momentum, alpha=1 - share)
        return torch.where(self.weights[name].keep, momentum, decayed)

    def forward_weight(self, name: str, weight: Tensor, step: int) -> Tensor:
        """All of W."""
        return weight
