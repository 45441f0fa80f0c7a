"""Sirius: the whole model reads what the sparse one drafted, and keeps what it finds likely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compressllm.core.protocols import CORRECTORS


@CORRECTORS.register("sirius")
@dataclass(frozen=True)
class Sirius:
    """Every ``period`` tokens the dense model reads the draft, rewrites its keys and values, and cuts what is unlikely.

    Args:
        period: Tokens of a dense pass: the newest one, and those drafted after it. On a CPU, where a pass of many costs
            more than one of a token, about 4; on a GPU up to 16.
        threshold: Likelihood from which a drafted token stands; 0 lets all stand.
        temperature: Of the softmax that likelihoods are taken from.
        rule: ``likely`` as published; ``likely-or-best``, where the dense model's own choice stands however unlikely,
            so that it is not cut and put back; ``exact``, where nothing else stands: greedily the dense model's text,
            sampling its distribution (speculative sampling). With a threshold above 0.5 all rules are greedily exact.
        width: Drafts tried in parallel, a tree of which the dense model reads all at once; greedy only. On a CPU 1.

    Source: Zhou et al., Sirius: Contextual Sparsity with Correction for Efficient LLMs, arXiv 2409.03856, sections 4
    and 5; the rule ``likely-or-best`` is ours. Exact sampling: Leviathan et al., arXiv 2211.17192, algorithm 1.
    """

    period: int = 4
    threshold: float = 0.1
    temperature: float = 0.6
    rule: Literal["likely-or-best", "likely", "exact"] = "likely-or-best"
    width: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.period < 1 or self.width < 1:
            raise ValueError(f"period {self.period} and width {self.width} are at least 1")
        if self.threshold < 0 or self.temperature <= 0:
            raise ValueError(f"threshold {self.threshold} is at least 0, temperature {self.temperature} above 0")

    @property
    def exact(self) -> bool:
        """By the rule of that name; greedily a threshold that only the best choice can reach does the same."""
        return self.rule == "exact"

    def accepts(self, drafted: Tensor, logits: Tensor, best: Tensor) -> Tensor:
        """By the rule."""
        if self.rule == "exact":
            return drafted == best
        likelihood = (logits.double() if logits.element_size() == 8 else logits.float()) / self.temperature
        likely = likelihood.softmax(-1).gather(-1, drafted[:, None])[:, 0] >= self.threshold
        return likely | (drafted == best) if self.rule == "likely-or-best" else likely
