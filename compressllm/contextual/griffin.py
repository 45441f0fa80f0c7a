"""GRIFFIN: the neurons that a prompt's tokens use most in proportion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from compressllm.core.protocols import NEURON_SELECTORS, BlockPass, PromptScores


@NEURON_SELECTORS.register("griffin")
@dataclass(frozen=True)
class Griffin:
    """One set a prompt: neurons by their share of each prompt token's activation; needs no calibration.

    ``s_j = sqrt(sum_t (h_tj / ||h_t||)^2)`` over the prompt's tokens t, the largest kept.

    Source: Dong et al., Prompt-prompted Adaptive Structured Pruning, arXiv 2404.01365, without the root, which orders
    nothing anew; a token none of whose neurons is active counts nothing, where theirs is not a number.
    """

    level: ClassVar[Literal["prompt", "token", "input"]] = "prompt"
    calibrated: ClassVar[bool] = False

    def fit(self, blocks: Callable[[], Iterator[BlockPass]]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def score(self, h: Tensor) -> Tensor:
        """Sum of squared shares."""
        h = h.float()
        shares: Tensor = h / h.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return shares.square().sum(0)

    def choose(
        self, scores: Sequence[PromptScores], counts: Sequence[int], fitted: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """The prompt's scores as they are."""
        return [one.total for one in scores]
