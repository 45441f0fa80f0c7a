"""Perplexity under the papers' protocol."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from compressllm.core.errors import CalibrationError
from compressllm.core.finite import first_not_finite, said_of
from compressllm.core.halving import Halving
from compressllm.core.parallel import map_batches
from compressllm.core.run import Track, untracked

# A CPU has one batch on each core; a GPU wants more work at once, how much is not measured.
_BATCH_TOKENS_CPU: Final = 1024
_BATCH_TOKENS: Final = 8192
# Float32 logits at one time. On a CPU, chunks that stay in cache are several times quicker than a whole window.
_CHUNK_LOGITS_CPU: Final = 1 << 22
_CHUNK_LOGITS: Final = 1 << 26


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, and how it was measured.

    Args:
        perplexity: ``exp(nll)``.
        nll: Mean over windows of the mean cross entropy over a window's targets, in nats.
        tokens: Targets scored: one fewer than ``seqlen`` in each window.
        windows: Number of windows.
        seqlen: Tokens in a window.
        dtype: Dtype the model computed in; the loss is always float32.
        window_nll: Each window's mean cross entropy, for error bars.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seqlen: int
    dtype: str
    window_nll: tuple[float, ...]

    @property
    def protocol(self) -> str:
        """One line that says how the loss was taken; what the windows are, `Windows.rule` says."""
        return (
            f"exp of the mean over {self.windows} windows of the mean float32 cross entropy over "
            f"{self.seqlen - 1} targets, each window on its own, model in {self.dtype}"
        )


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_tokens: int | None = None,
    progress: Track = untracked,
    warn: Callable[[str], None] = lambda message: None,
) -> Perplexity:
    """Measure a causal language model on token windows.

    Each window is scored without context from the others, and its first token not at all. The model's own
    forward makes the logits, so that scaling and soft caps are in; it is left in the mode it was in.

    Args:
        model: On any device, in any float dtype.
        windows: (n, seqlen) token ids.
        batch_tokens: Tokens in one forward, for speed only; None suits the device. Halved where the device runs out
            of memory.
        progress: Shows how far it is.
        warn: Told when that happens.

    Raises: CalibrationError if a token id is outside the vocabulary, or a window's loss is not finite, with the module
        in which it began.

    Source: GPTQ, SparseGPT and Wanda, whose ``exp(sum(seqlen * mean) / (n * seqlen))`` is the same number.
    """
    _check(model, windows)
    count, seqlen = windows.shape
    device = model.get_input_embeddings().weight.device
    batch_tokens = batch_tokens or (_BATCH_TOKENS_CPU if device.type == "cpu" else _BATCH_TOKENS)
    batches = torch.split(windows, max(1, batch_tokens // seqlen))
    losses: list[float] = []
    halving, measure = Halving(warn), partial(_window_losses, model)
    training = model.training
    model.eval()
    try:

        def work(batch: int) -> list[float]:
            return list(chain.from_iterable(halving.run(measure, batches[batch].to(device))))

        measured = map_batches(work, len(batches), device)
        for batch_losses in progress(measured, len(batches), "evaluating"):
            for loss in batch_losses:
                if not math.isfinite(loss):
                    ids = windows[len(losses)][None].to(device)
                    where = said_of(first_not_finite(model, lambda ids=ids: measure(ids)))  # type: ignore[misc]
                    raise CalibrationError(
                        f"window {len(losses)} of {count}: loss is {loss}{where}; check the checkpoint's weights, "
                        "or compute with --dtype float32"
                    )
                losses.append(loss)
    finally:
        model.train(training)
    nll = math.fsum(losses) / count
    value = math.exp(nll) if nll < 700 else math.inf  # a ruined model's is past the range of a float
    dtype = str(model.dtype).removeprefix("torch.")
    return Perplexity(value, nll, count * (seqlen - 1), count, seqlen, dtype, tuple(losses))


@torch.no_grad()  # not inference_mode: what layers cache in it could never be trained on
def _window_losses(model: PreTrainedModel, ids: Tensor) -> list[float]:
    """Mean cross entropy of each window of an (n, seqlen) batch."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits  # (n, seqlen, vocabulary), in the model's dtype
    rows = max(1, (_CHUNK_LOGITS_CPU if logits.device.type == "cpu" else _CHUNK_LOGITS) // logits.shape[-1])
    ids = ids.to(logits.device)  # a model spread over devices ends on another than it began on
    losses = []
    for window, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            total += cross_entropy(window[part].float(), targets[part], reduction="none").double().sum().cpu()
        losses.append(float(total) / len(targets))
    return losses


def _check(model: PreTrainedModel, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(f"got windows of shape {tuple(windows.shape)}; at least one of 2 tokens is needed")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or highest >= vocabulary:
        raise CalibrationError(
            f"token ids run from {lowest} to {highest}, the model's vocabulary has {vocabulary}; "
            "were they made with another tokenizer?"
        )
