"""Decode token by token with a static cache, in as little time outside the linears as can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

#: (batch, 1) ids at a position -> (batch, vocabulary) logits; what it adds to the cache it has written there.
Step = Callable[[Tensor, int], Tensor]
#: A model, and a cache that a prompt has filled -> its step, or None
Native = Callable[[PreTrainedModel, StaticCache], Step | None]


class Decoder:
    """A model with a cache of fixed length, so that every step has the same shapes and may be compiled.

    Args:
        model: In eval mode. Sequences of a batch are of one length, without padding.
        length: Most tokens of a sequence, prompt included.
        compiled: Compile the step of one token as one graph; this takes a minute or so, and a C++ compiler on a CPU.
        native: Asked after the first prompt for a step of its own, which is then taken instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        length: int,
        compiled: bool = False,
        native: Native | None = None,
    ) -> None:
        self.model = model
        #: How steps are made: ``native``, ``compiled`` or ``transformers``; known once a prompt was read.
        self.kind = "compiled" if compiled else "transformers"
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._next = torch.compile(self._forward, fullgraph=True, dynamic=False) if compiled else self._forward
        self._native = native
        self._step: Step = self._step_of_model

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Begin anew with (batch, tokens) ids. Returns (batch, vocabulary) logits of what comes next."""
        self._cache.reset()
        self._length = ids.shape[1]
        logits = self._forward(ids, torch.arange(self._length, device=ids.device).unsqueeze(0))
        if self._native and (step := self._native(self.model, self._cache)):
            self._step, self.kind = step, "native"
        self._native = None  # the cache stays where it is
        return logits

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Go on with (batch, 1) ids. Returns (batch, vocabulary) logits of what comes next."""
        logits = self._step(ids, self._length)
        self._length += 1
        return logits

    def _step_of_model(self, ids: Tensor, position: int) -> Tensor:
        return self._next(ids, torch.full((1, 1), position, device=ids.device))

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, position_ids=position, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]
