"""Sentence vectors: the mean of a transformer's last hidden states over the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from compressllm.core.run import Run
from compressllm.select.batches import in_batches
from compressllm.select.vectorcache import content_key


@dataclass(frozen=True)
class TextEncoder:
    """A transformer without its head, and its tokenizer.

    Args:
        model: Gives ``last_hidden_state``; on the device the vectors are computed on.
        identity: What its vectors depend on, for the cache; None keeps nothing.
        limit: Tokens of a text that are read.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    identity: Sequence[object] | None
    limit: int

    def encode(self, texts: Sequence[str], device: torch.device, run: Run) -> Tensor:
        """(n, hidden size) float32 of unit rows, on the CPU."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.limit)["input_ids"]
        return in_batches(
            lambda batch: self._pooled([ids[item] for item in batch], device),
            [len(one) for one in ids],
            [content_key(*one) for one in ids],
            self.model.config.get_text_config().hidden_size,
            None if self.identity is None else ("embedding", *self.identity),
            device,
            run,
            "embedding prompts",
        )

    def _pooled(self, batch: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        ids = torch.zeros(len(batch), max(1, *map(len, batch)), dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, : len(one)], seen[row, : len(one)] = torch.tensor(one), 1
        ids, seen = ids.to(device), seen.to(device)
        with torch.inference_mode():
            hidden = self.model(input_ids=ids, attention_mask=seen).last_hidden_state.float()
            return functional.normalize((hidden * seen[..., None]).sum(dim=1)).cpu()
