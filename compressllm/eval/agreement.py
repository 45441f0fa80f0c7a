"""Whether two models compute the same."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.windows import evaluation_windows
from compressllm.core.difference import relative_difference
from compressllm.core.errors import FormatError
from compressllm.models.bundle import Bundle


def logit_difference(model: Bundle, other: Bundle, ids: Tensor) -> float:
    """``max |a - b| / max |b|`` of the logits that a model (a) and another (b) give for the same tokens.

    Checkpoints are loaded one after the other, in float32; a model that is in memory stays as it is.

    Args:
        ids: (windows, seqlen) token ids.

    Raises: FormatError if the models differ in vocabulary.
    """
    if model.vocab_size != other.vocab_size:
        raise FormatError(
            f"one model has a vocabulary of {model.vocab_size}, the other of {other.vocab_size}; "
            "only models of the same vocabulary can be compared"
        )
    return relative_difference(_logits(model, ids), _logits(other, ids))


def shared_ids(model: Bundle, other: Bundle, tokens: int) -> tuple[Tensor, str]:
    """(windows, seqlen) token ids to compare two models on, and where they are from.

    They are ``tokens`` of the built-in text if the first model has a tokenizer, and else random; windows are as long
    as both models allow, and what does not fill one is left out.
    """
    limits = [bundle.max_seqlen for bundle in (model, other) if bundle.max_seqlen is not None]
    seqlen = min([tokens, *limits])
    if model.tokenizer is None:
        ids = torch.randint(model.vocab_size, (tokens // seqlen, seqlen), generator=torch.Generator().manual_seed(0))
        return ids, f"{ids.numel()} random tokens"
    windows = evaluation_windows(
        "builtin", model.tokenizer, seqlen, tokens // seqlen, max_seqlen=seqlen, vocab_size=model.vocab_size
    )
    return windows.ids, f"{windows.ids.numel()} tokens of the builtin text"


def _logits(bundle: Bundle, ids: Tensor) -> Tensor:
    """(windows, seqlen, vocabulary), a window at a time."""
    model: PreTrainedModel = bundle.live(torch.float32)
    with torch.inference_mode():
        return torch.cat([model(input_ids=window[None], use_cache=False).logits.float() for window in ids])
