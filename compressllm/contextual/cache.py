"""Keys and values in room set aside once, whose newest rows can be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from compressllm.core.errors import UnsupportedModelError

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


class _Rows(CacheLayerMixin):  # type: ignore[misc]
    """One layer's rows. All are kept, also where attention slides: its mask hides those out of the window."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty((*key_states.shape[:-2], self.capacity, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:-2], self.capacity, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[..., first : self.length, :] = key_states
        self.values[..., first : self.length, :] = value_states
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class DraftCache(Cache):  # type: ignore[misc]
    """A cache for one sequence whose newest rows can be forgotten or replaced by some of them, at no cost.

    Args:
        config: The model's.
        capacity: Most rows at one time.

    Raises: UnsupportedModelError for models that keep a running state, which cannot be taken back.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        text = config.get_text_config()
        if other := set(getattr(text, "layer_types", None) or ()) - _KINDS:
            raise UnsupportedModelError(f"has layers of {min(other)}, whose state cannot be taken back after a draft")
        super().__init__(layers=[_Rows(capacity) for _ in range(text.num_hidden_layers)])

    @property
    def length(self) -> int:
        """Rows held."""
        return int(self.layers[0].length)

    def rewind(self, rows: int) -> None:
        """Forget the newest rows. Raises ValueError if there are not as many."""
        if not 0 <= rows <= self.length:
            raise ValueError(f"cannot take back {rows} of {self.length} rows")
        for layer in self.layers:
            layer.length -= rows

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Of the rows from ``start`` on keep these, numbered from there and ascending, one behind the other."""
        chosen = start + torch.tensor(rows)
        end = start + len(rows)
        for layer in self.layers:
            for held in (layer.keys, layer.values):
                held[..., start:end, :] = held.index_select(-2, chosen.to(held.device))
            layer.length = end
