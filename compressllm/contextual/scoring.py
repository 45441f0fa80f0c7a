"""How well a model that drafts predicts a text, in one pass for all of its tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressllm.contextual.attach import Contextual, prompt_through
from compressllm.contextual.control import Mode
from compressllm.core.errors import CalibrationError
from compressllm.core.protocols import Corrector


@dataclass(frozen=True)
class Scored:
    """Predictions of windows after their prompts, dense and as drafting one token after another would make them.

    Args:
        dense_nll: Mean cross entropy of the dense model, in nats.
        sparse_nll: Of the sparse one.
        by_offset: Of ranges of positions after the prompt: first, last, and both.
        agreement: Fraction of positions where both predict the same token.
        stands: Fraction where a corrector would let the sparse one's prediction stand; None without one. Later than the
            prompt nothing is rewritten here, so that drafts which are corrected stand more often than this.
        divergence: Mean KL(dense || sparse), in nats.
        tokens: Positions.
    """

    dense_nll: float
    sparse_nll: float
    by_offset: list[dict[str, float]]
    agreement: float
    stands: float | None
    divergence: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "dense_perplexity": math.exp(min(self.dense_nll, 700)),
            "sparse_perplexity": math.exp(min(self.sparse_nll, 700)),
            "by_offset": self.by_offset,
            "agreement": self.agreement,
            "stands": self.stands,
            "divergence": self.divergence,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def decode_logits(contextual: Contextual, window: Tensor, prompt: int) -> Tensor:
    """(seqlen, vocabulary) logits of one text: its first ``prompt`` tokens dense, each later one sparse.

    What a token's neurons are does not depend on later tokens, and attention looks back only: so one pass computes what
    drafting token by token does.

    Args:
        window: (seqlen,) token ids.
        prompt: Tokens that neurons are chosen by, at least one.
    """
    prompt_through(contextual, window[None, :prompt])
    with contextual.control.set(Mode.SCORE, prompt):
        logits: Tensor = contextual.model(input_ids=window[None], use_cache=False).logits[0]
    return logits


def score_windows(contextual: Contextual, windows: Tensor, prompt: int, corrector: Corrector | None = None) -> Scored:
    """Predictions of all windows.

    Args:
        windows: (n, seqlen) token ids.
        prompt: Tokens of each that are its prompt; the last of them makes a prediction that is dense, not counted.
        corrector: See `Scored.stands`.

    Raises: CalibrationError if windows are not longer than the prompt by two.
    """
    if windows.shape[1] < prompt + 2:
        raise CalibrationError(f"windows of {windows.shape[1]} tokens leave nothing after a prompt of {prompt}")
    ranges = list(_ranges(windows.shape[1] - prompt - 1))
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    same, stands, divergence = [], [], []
    for window in windows:
        sparse = decode_logits(contextual, window, prompt)[prompt:-1].float()
        with contextual.control.set(Mode.CHECK), torch.inference_mode():
            dense = contextual.model(input_ids=window[None], use_cache=False).logits[0, prompt:-1].float()
        targets = window[prompt + 1 :].to(dense.device)
        for kept, logits in zip(losses, (dense, sparse), strict=True):
            kept.append(cross_entropy(logits, targets, reduction="none").double())
        guess = sparse.argmax(-1)
        best = dense.argmax(-1)
        same.append((guess == best).double())
        if corrector is not None:
            stands.append(corrector.accepts(guess, dense, best).double())
        p = dense.log_softmax(-1)
        divergence.append((p.exp() * (p - sparse.log_softmax(-1))).sum(-1).double())
    dense_loss, sparse_loss = (torch.stack(kept) for kept in losses)
    return Scored(
        float(dense_loss.mean()),
        float(sparse_loss.mean()),
        [
            {
                "first": prompt + 1 + first,
                "last": prompt + last,
                "dense_nll": float(dense_loss[:, first:last].mean()),
                "sparse_nll": float(sparse_loss[:, first:last].mean()),
            }
            for first, last in ranges
        ],
        float(torch.stack(same).mean()),
        float(torch.stack(stands).mean()) if stands else None,
        float(torch.stack(divergence).mean()),
        dense_loss.numel(),
    )


def _ranges(count: int) -> Sequence[tuple[int, int]]:
    """0 to 64, 64 to 128, 128 to 256, ..: where drift shows."""
    edges = [0, 64]
    while edges[-1] < count:
        edges.append(2 * edges[-1])
    return [(first, min(last, count)) for first, last in itertools.pairwise(edges) if first < count]
