"""How close generated texts are to the dense model's own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressllm.contextual.attach import Contextual
from compressllm.contextual.decode import Counts, Decoding
from compressllm.contextual.density import measured_density, read_density
from compressllm.contextual.sirius import Sirius
from compressllm.core.protocols import Corrector

#: A corrector that never drafts: the dense model, through the same loop.
DENSE = Sirius(period=1)


@dataclass(frozen=True)
class Texts:
    """What was generated for some prompts, and how.

    Args:
        tokens: New ids of each prompt.
        counts: What each generation did.
        read: Weights a drafted token read, over a dense token's.
    """

    tokens: list[list[int]]
    counts: list[Counts]
    read: float

    def facts(self) -> dict[str, Any]:
        """Speed and effort over all prompts, for the manifest."""
        total = Counts(
            drafts=sum(one.drafts for one in self.counts),
            checks=sum(one.checks for one in self.counts),
            advances=[n for one in self.counts for n in one.advances],
        )
        whole = [n for one in self.counts for n in one.advances[:-1]]
        seconds, later = sum(one.seconds for one in self.counts), sum(one.tokens - 1 for one in self.counts)
        return {
            "tokens": sum(one.tokens for one in self.counts),
            "tokens_per_second": later / seconds if seconds and later else None,
            "prompt_seconds": sum(one.prompt_seconds for one in self.counts),
            "advance_length": sum(whole) / len(whole) if whole else None,
            "advance_length_all": sum(total.advances) / len(total.advances) if total.advances else None,
            "drafts": total.drafts,
            "checks": total.checks,
            "read_density": self.read,
            "effective_density": measured_density(total, self.read),
        }


def generate_all(
    contextual: Contextual,
    prompts: Sequence[Tensor],
    limits: int | Sequence[int],
    corrector: Corrector | None,
    ends: frozenset[int] = frozenset(),
) -> Texts:
    """Continue every prompt greedily.

    Args:
        prompts: (1, tokens) ids each.
        limits: Most tokens to add, to all of them or to each.
        corrector: None drafts without checks; `DENSE` never drafts.
    """
    contextual.reset_counts()
    made = []
    for ids, limit in zip(prompts, [limits] * len(prompts) if isinstance(limits, int) else limits, strict=True):
        decoding = Decoding(contextual, ids, limit, corrector, ends=ends)
        tokens = [token for span in decoding.spans() for token in span]
        made.append((tokens, decoding.counts))
    return Texts([tokens for tokens, _ in made], [counts for _, counts in made], read_density(contextual))


def likeness(texts: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> dict[str, float]:
    """Fraction that are the dense model's to the token, mean length of what both begin with, and how alike they are."""
    pairs = list(zip(texts, dense, strict=True))
    begun = [_common_prefix(mine, theirs) for mine, theirs in pairs]
    return {
        "exact_match": sum(list(mine) == list(theirs) for mine, theirs in pairs) / len(pairs),
        "common_prefix": sum(begun) / len(begun),
        "similarity": sum(_similarity(mine, theirs) for mine, theirs in pairs) / len(pairs),
    }


def _common_prefix(mine: Sequence[int], theirs: Sequence[int]) -> int:
    return next((at for at, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))


def _similarity(mine: Sequence[int], theirs: Sequence[int]) -> float:
    return difflib.SequenceMatcher(None, list(mine), list(theirs), autojunk=False).ratio()


def prompts_of(windows: Tensor, tokens: int) -> list[Tensor]:
    """The first tokens of each window, as prompts."""
    return [window[None, :tokens].clone() for window in torch.unbind(windows)]
