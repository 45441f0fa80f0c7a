"""Measure that a model with reordered channels computes what it computed before, one block in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.inputs import BlockInputs, embed_windows, finish_windows
from compressllm.core.difference import relative_difference
from compressllm.core.errors import UnsupportedModelError
from compressllm.models.blocks import DecoderBlocks, find_blocks
from compressllm.models.loading import place_

#: The largest relative difference that rounding in float32 is taken to explain.
TOLERANCE = 1e-5

#: Parameter or persistent buffer of a model -> its value.
Read = Callable[[str], Tensor]


def measure_difference(
    model: PreTrainedModel, names: set[str], before: Read, after: Read, stream: Tensor | None, ids: Tensor
) -> float:
    """The largest relative difference of any block's outputs, and of the logits, in float32.

    Each block is given the same inputs before and after, but for their order, so that differences do not add up from
    block to block and one that is no rounding shows where it arises.

    Args:
        model: Tells the architecture only; its weights are not read.
        names: Parameters and persistent buffers that can be read; tied ones may be missing.
        stream: (hidden,) the old channel at each new place of the hidden states, or None if these keep their order.
        ids: (windows, seqlen) token ids.

    Raises: UnsupportedModelError naming the first part that computes something else.
    """
    measure = _Measurement(model, names, stream, ids)
    return measure.run(before, after)


class _Measurement:
    def __init__(self, model: PreTrainedModel, names: set[str], stream: Tensor | None, ids: Tensor) -> None:
        self._names, self._ids = names, ids
        with init_empty_weights(include_buffers=False):
            self._model: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
        self._model.eval()
        self._meta = dict(self._model.named_parameters(remove_duplicate=False))
        self._blocks: DecoderBlocks = find_blocks(self._model)
        hidden = self._model.config.get_text_config().hidden_size
        self._new = torch.arange(hidden) if stream is None else stream.cpu()
        self._old = self._new.argsort()
        self._largest = 0.0

    def run(self, before: Read, after: Read) -> float:
        outside = [name for name in self._names if not name.startswith(f"{self._blocks.prefix}.")]
        self._place_(outside, before)
        first = self._embed().hidden(0)
        self._place_(outside, after)
        inputs = self._embed()
        self._compare("the embedding", inputs.hidden(0), first[..., self._new])
        self._release_(outside)

        for index, module in enumerate(self._blocks.modules):
            name = self._blocks.name(index)
            inside = [key for key in self._names if key.startswith(f"{name}.")]
            self._place_(inside, before)
            expected = inputs.call(module, name, inputs.hidden(0)[..., self._old])
            self._place_(inside, after)
            inputs.advance(module, name)
            if expected is not None:
                self._compare(name, inputs.hidden(0), expected[..., self._new])
            self._release_(inside)

        self._place_(outside, before)
        expected = self._logits(inputs.hidden(0)[..., self._old])
        self._place_(outside, after)
        self._compare("the output head", self._logits(inputs.hidden(0)), expected)
        return self._largest

    def _compare(self, where: str, after: Tensor, before: Tensor) -> None:
        apart = relative_difference(after, before)
        if not apart <= TOLERANCE:
            raise UnsupportedModelError(
                f"{where}: with its channels reordered it computes something else (relative difference {apart:.1e}, "
                f"at most {TOLERANCE:.0e} is rounding); name fewer kinds of channels under scope"
            )
        self._largest = max(self._largest, apart)

    def _embed(self) -> BlockInputs:
        return embed_windows(
            self._model,
            self._blocks,
            self._ids,
            device=torch.device("cpu"),
            batch_windows=len(self._ids),
            memory_limit=1 << 40,
            spill_folder=None,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        return finish_windows(self._model, self._blocks, self._ids, hidden)

    def _place_(self, names: list[str], read: Read) -> None:
        for name in names:
            place_(self._model, name, read(name), torch.float32, "cpu")
        self._model.tie_weights(missing_keys=self._model.state_dict().keys() - self._names)

    def _release_(self, names: list[str]) -> None:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            if leaf in (module := self._model.get_submodule(owner))._parameters:
                module._parameters[leaf] = self._meta[name]
