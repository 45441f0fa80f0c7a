"""Decode token by token with a static cache, in as little time outside the linears as torch allows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache


class Decoder:
    """A model with a cache of fixed length, so that every step has the same shapes and may be compiled.

    Args:
        model: In eval mode. Sequences of a batch are of one length, without padding.
        length: Most tokens of a sequence, prompt included.
        compiled: Compile the step of one token as one graph; this takes a minute or so, and a C++ compiler on a CPU.
    """

    def __init__(self, model: PreTrainedModel, length: int, compiled: bool = False) -> None:
        self.model = model
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._next = torch.compile(self._forward, fullgraph=True, dynamic=False) if compiled else self._forward

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Begin anew with (batch, tokens) ids. Returns (batch, vocabulary) logits of what comes next."""
        self._cache.reset()
        self._position = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        logits = self._forward(ids, self._position)
        self._position = self._position[:, -1:] + 1
        return logits

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Go on with (batch, 1) ids. Returns (batch, vocabulary) logits of what comes next."""
        logits = self._next(ids, self._position)
        self._position = self._position + 1
        return logits

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, position_ids=position, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]
