"""Put the channels of tensors in another order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compressllm.core.masks import raw
from compressllm.models.channels import Channels, Slot


class Folds:
    """New orders of channels, folded into every tensor that holds them.

    Args:
        channels: Channels to reorder.
        orders: Their name -> (sets, size) int64: the old channel at each new place.
    """

    def __init__(self, channels: Iterable[Channels], orders: Mapping[str, Tensor]) -> None:
        self.orders = orders
        self._slots: dict[str, list[tuple[Slot, Tensor]]] = {}
        for one in channels:
            for slot in one.slots:
                self._slots.setdefault(slot.tensor, []).append((slot, orders[one.name]))

    @property
    def stream(self) -> Tensor | None:
        """(hidden,) the old channel at each new place of the hidden states; None if they keep their order."""
        order = self.orders.get("residual")
        return None if order is None else order[0]

    @property
    def tensors(self) -> set[str]:
        """Names of the tensors that change."""
        return set(self._slots)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Tensor ``name`` with its channels in the new order; the very tensor if it holds none of them."""
        for slot, order in self._slots.get(name, ()):
            index = _index(slot, order, tensor.shape[slot.axis]).to(tensor.device)
            tensor = raw(tensor).index_select(slot.axis, index).view(tensor.dtype)
        return tensor

    def undo(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor that `apply` made this of."""
        for slot, order in self._slots.get(name, ()):
            index = _index(slot, order.argsort(dim=1), tensor.shape[slot.axis]).to(tensor.device)
            tensor = raw(tensor).index_select(slot.axis, index).view(tensor.dtype)
        return tensor


def sets_of(slot: Slot, scores: Tensor, sets: int, size: int) -> Tensor:
    """The columns of an (out, in) score matrix that a reader's slot names, set by set: (sets, rows, size).

    A set that comes several times has all of its rows for each.
    """
    columns = slot.places(sets, size).to(scores.device)  # (sets, repeat, size)
    return scores[:, columns].permute(1, 2, 0, 3).flatten(1, 2)


def _index(slot: Slot, order: Tensor, length: int) -> Tensor:
    """(length,): the old index at each new one."""
    sets, size = order.shape
    places = slot.places(sets, size)
    index = torch.arange(length)
    index[places.flatten()] = places.gather(2, order[:, None].expand_as(places)).flatten()
    return index
