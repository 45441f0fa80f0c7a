"""From logits to tokens: the best one, or one drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: What transformers calls a logits processor: (1, n) ids and (1, vocabulary) scores to scores.
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """How a token is taken from what a model says comes next.

    Args:
        drawn: Draw from the distribution, with torch's generator, in place of taking the best.
        temperature: The distribution's, if drawn.
        processors: Change the logits before, given the tokens before; None if there are none.
    """

    drawn: bool = False
    temperature: float = 1.0
    processors: Processor | None = None

    def process(self, logits: Tensor, before: Sequence[int], drafted: Sequence[int] = ()) -> Tensor:
        """(n, vocabulary) scores: row i comes after ``before`` and the first i of ``drafted``."""
        if self.processors is not None:
            tokens = torch.tensor([[*before, *drafted]], device=logits.device)
            first = len(before)
            rows = [self.processors(tokens[:, : first + i], logits[i : i + 1].float()) for i in range(len(logits))]
            logits = torch.cat(rows)
        return logits / self.temperature if self.drawn and self.temperature != 1 else logits

    def take(self, scores: Tensor) -> int:
        """One token from (vocabulary,) scores."""
        if not self.drawn:
            return int(scores.argmax())
        return int(torch.multinomial(probabilities(scores), 1))


def probabilities(scores: Tensor) -> Tensor:
    """(..., vocabulary), float32 at least."""
    return (scores if scores.element_size() > 4 else scores.float()).softmax(-1)


def accept_drawn(drafted: Sequence[int], drafter: Sequence[Tensor], dense: Tensor) -> tuple[int, int]:
    """How many drawn tokens stand, and the one that follows them, so that all are distributed as the dense model's.

    Args:
        drafter: What each was drawn from: (vocabulary,) probabilities.
        dense: (len(drafted) + 1, vocabulary) probabilities.

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1.
    """
    for at, token in enumerate(drafted):
        ratio = float(dense[at, token]) / max(float(drafter[at][token]), 1e-45)
        if float(torch.rand(())) >= ratio:
            rest = (dense[at] - drafter[at]).clamp_min(0)
            return at, int(torch.multinomial(rest if float(rest.sum()) > 0 else dense[at], 1))
    return len(drafted), int(torch.multinomial(dense[-1], 1))
