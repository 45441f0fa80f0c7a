"""Where the weights are while a model is walked: in the model, or on disk with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.models.checkpoint import Checkpoint
from compressllm.models.experts import place_expert_
from compressllm.models.linears import held_otherwise
from compressllm.models.loading import place_, skeleton
from compressllm.models.shards import ShardWriter
from compressllm.models.tensornames import tensor_names


class Weights(Protocol):
    """Access to a model's weights, block by block.

    The weight of a prunable linear goes by the linear's name and ``.weight``, and is (out, in) whatever form the
    model and the checkpoint hold it in.
    """

    def load_(self, name: str) -> None:
        """Make the parameters of the module at path ``name`` real."""
        ...

    def load_original_(self, name: str) -> None:
        """Make the parameters of the module at path ``name`` real, as they were before the walk."""
        ...

    def load_outside_(self, blocks: str) -> None:
        """Make the parameters outside the blocks and the output head real, as the first block's input needs them."""
        ...

    def read(self, name: str) -> Tensor:
        """Weight or other parameter ``name`` of a loaded module, in its stored dtype. Not to be changed."""
        ...

    def replace_(self, name: str, value: Tensor) -> None:
        """Give weight or other parameter ``name`` of a loaded module a new value, in any float dtype."""
        ...

    def release_(self, name: str) -> None:
        """The module at path ``name`` is not needed in memory any more."""
        ...

    def release_outside_(self, blocks: str) -> None:
        """What `load_outside_` made real is not needed any more."""
        ...


class LiveWeights:
    """Weights the model holds itself. Changes them in place; nothing is ever released."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._special = held_otherwise(model)

    def load_(self, name: str) -> None:
        """Nothing to do."""

    def load_original_(self, name: str) -> None:
        """Refused: what was changed in place is lost."""
        raise TypeError(f"{name}: a model in memory does not keep what its blocks were before they were changed")

    def load_outside_(self, blocks: str) -> None:
        """Nothing to do."""

    def read(self, name: str) -> Tensor:
        """The parameter, or a copy in the order of (out, in) of one that is held the other way round."""
        if name in self._special:
            return self._special[name].weight.contiguous()
        parameter: Tensor = self._model.get_parameter(name)
        return parameter.data

    def replace_(self, name: str, value: Tensor) -> None:
        """Copy ``value`` into the parameter."""
        held = self._special[name].weight if name in self._special else self._model.get_parameter(name).data
        held.copy_(value)

    def release_(self, name: str) -> None:
        """Nothing to do."""

    def release_outside_(self, blocks: str) -> None:
        """Nothing to do."""


class StreamedWeights:
    """Weights read from a checkpoint block by block, and written to another as blocks are finished.

    Args:
        model: Its skeleton; a module's parameters are real between load_ and release_.
        source: Where weights come from.
        out: Receives finished blocks, under the checkpoint's names; None if nothing is ever finished.
        finished: Paths of the blocks that ``out`` holds already; these are read from it.
        dtype: Dtype of the parameters while they are real; what is written keeps the stored dtype.
        device: Where parameters are put.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Checkpoint,
        out: ShardWriter | None,
        finished: set[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model, self._source, self._out = model, source, out
        self.finished = set(finished)
        self._dtype, self._device = dtype, device
        self._stored_name = tensor_names(model, source)
        self._special = held_otherwise(model)
        self._meta = dict(model.state_dict(keep_vars=True))
        self._held: dict[str, Tensor] = {}
        # What is computed at construction, as rotary frequencies are, may depend on the dtype: Gemma's embedding scale.
        computed = model if model.dtype == dtype else skeleton(source, dtype)
        for name, buffer in list(computed.named_buffers()):
            if name not in self._stored_name:
                place_(model, name, buffer, None, device)

    def load_(self, name: str) -> None:
        """Read the module's tensors and put them on the device."""
        self._load_(name, self._written.read if name in self.finished else self._source.read)

    def load_original_(self, name: str) -> None:
        """Read the module's tensors from the source, finished or not, and put them on the device."""
        self._load_(name, self._source.read)

    def load_outside_(self, blocks: str) -> None:
        """Read what lies outside the blocks, but for the output head, which no block needs."""
        for key in self._outside(blocks):
            self._place_(key, self._source.read(self._stored_name[key]))

    def read(self, name: str) -> Tensor:
        """The tensor with the bits that are stored, on the CPU."""
        held = self._held[name]
        return self._special[name].turned(held).contiguous() if name in self._special else held

    def replace_(self, name: str, value: Tensor) -> None:
        """Round ``value`` to the stored dtype, for the file, and from there to the dtype of the walk."""
        if name in self._special:
            value = self._special[name].turned(value).contiguous()
        self._hold_(name, value.to("cpu", self._held[name].dtype))

    def release_(self, name: str) -> None:
        """Free the module's tensors."""
        for key in self._inside(name):
            self._held.pop(key, None)
            self._unload_(key)

    def release_outside_(self, blocks: str) -> None:
        """Free what lies outside the blocks."""
        for key in self._outside(blocks):
            self._unload_(key)

    def finish_(self, name: str) -> None:
        """Write a loaded block's tensors out and sync them to disk."""
        for key in self._inside(name):
            self._written.write(self._stored_name[key], self._held[key])
        self._written.sync()
        self.finished.add(name)

    def finish_rest_(self) -> None:
        """Copy every tensor outside the finished blocks as it is."""
        inside = {self._stored_name[key] for name in self.finished for key in self._inside(name)}
        for name in self._source.specs:
            if name not in inside:
                self._written.write(name, self._source.read(name))
        self._written.sync()

    @property
    def _written(self) -> ShardWriter:
        if self._out is None:
            raise TypeError("these weights are only read")
        return self._out

    def _hold_(self, key: str, stored: Tensor) -> None:
        """Keep a tensor as it is stored, for the file, and put it into the model."""
        placed = self._place_(key, stored)
        # An expert's place among all experts does for both, if it has the stored bits; there may be many experts.
        as_stored = placed is not None and placed.dtype == stored.dtype and placed.device == stored.device
        self._held[key] = placed if placed is not None and as_stored else stored

    def _place_(self, key: str, stored: Tensor) -> Tensor | None:
        """Put a tensor into the model; of an expert, the place it has there."""
        linear = self._special.get(key)
        if linear is not None and linear.expert is not None:
            return place_expert_(linear, stored, self._dtype, self._device)
        place_(self._model, key, stored, self._dtype, self._device)
        return None

    def _load_(self, name: str, read: Callable[[str], Tensor]) -> None:
        for key in self._inside(name):
            self._hold_(key, read(self._stored_name[key]))

    def _inside(self, name: str) -> list[str]:
        return [key for key in self._stored_name if key.startswith(f"{name}.")]

    def _outside(self, blocks: str) -> list[str]:
        base = f"{self._model.base_model_prefix}."
        return [key for key in self._stored_name if key.startswith(base) and not key.startswith(f"{blocks}.")]

    def _unload_(self, key: str) -> None:
        key = self._special[key].parameter if key in self._special else key
        owner, _, leaf = key.rpartition(".")
        module = self._model.get_submodule(owner)
        empty = self._meta[key]
        (module._parameters if isinstance(empty, nn.Parameter) else module._buffers)[leaf] = empty
