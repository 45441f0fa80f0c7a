"""Where scales of a linear's inputs cost nothing: what makes the inputs takes their inverse into its own weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.walker import Block
from compressllm.core.pattern import NM
from compressllm.models.channels import Channels, find_channels

_NORM = re.compile(r"(RMS|Layer)Norm")


@dataclass(frozen=True)
class Fold:
    """Linears whose inputs may be scaled, and the tensors that take the inverse of it.

    Args:
        into: What takes it: a norm, or the linear before.
        readers: Linears that are given these inputs, and nothing else is.
        columns: (in,) int64: the channel of each input. Inputs of one channel have one scale.
        rows: Parameter -> (channels,) int64: the place of each channel in its first dimension.
    """

    into: str
    readers: tuple[str, ...]
    columns: Tensor
    rows: Mapping[str, Tensor] = field(repr=False)


class Folds:
    """The folds of a model's blocks, as far as its parts are recognised.

    Names and shapes are taken for a hint only: whoever folds measures that the block computes what it did.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found = find_channels(model, ("attention", "mlp"), NM(1, 2))
        self._inner = {channels.name: channels for channels in found.channels}
        self._left = dict(line.split(": ", 1) for lines in found.left.values() for line in lines)

    def of(self, block: Block, names: Collection[str]) -> tuple[list[Fold], dict[str, str]]:
        """The folds of a block, and why there is none for the other linears of ``names``."""
        folds = list(_norms(block))
        reasons = dict.fromkeys(names, "what makes its inputs is not a norm or linear that is known to take scales")
        for name in names:
            if name in self._inner:
                made = _inner(self._inner[name])
                if made is None:
                    reasons[name] = "what makes its inputs is no product with a linear's outputs"
                else:
                    folds.append(made)
            elif name in self._left:
                reasons[name] = self._left[name]
        left = []
        for fold in folds:
            if lost := [name for name in (*fold.readers, fold.into) if name in block.linears and name not in names]:
                reasons |= dict.fromkeys(fold.readers, f"{lost[0]} would have to change, and is not quantised")
            else:
                left.append(fold)
                for name in fold.readers:
                    reasons.pop(name, None)
        return left, {name: reason for name, reason in reasons.items() if name in names}


def _norms(block: Block) -> Iterator[Fold]:
    """Norms whose very outputs linears are called with."""
    made: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    handles = []

    def note_output(name: str) -> Any:
        return lambda module, args, output: made.__setitem__(name, output)

    def note_input(name: str) -> Any:
        return lambda module, args: given.__setitem__(name, args[0])

    for path, module in block.module.named_modules(prefix=block.name):
        weight = getattr(module, "weight", None)
        if _NORM.search(type(module).__name__) and weight is not None and weight.dim() == 1:
            handles.append(module.register_forward_hook(note_output(path)))
    plain = {name: linear for name, linear in block.linears.items() if linear.form is None}
    for name, linear in plain.items():
        handles.append(linear.module.register_forward_pre_hook(note_input(name)))
    try:
        block.sample()
    finally:
        for handle in handles:
            handle.remove()
    for path, output in made.items():
        readers = tuple(name for name, tensor in given.items() if tensor is output)
        if readers:
            every = torch.arange(output.shape[-1])
            held = block.module.get_submodule(path.removeprefix(f"{block.name}.")).named_parameters(recurse=False)
            yield Fold(path, readers, every, {f"{path}.{key}": every for key, _ in held})


def _inner(channels: Channels) -> Fold | None:
    """From value to output, or from up to down where a gate is between; None if an MLP has no gate.

    Behind a gate, ``act(gate) * up``, only up is a factor of its own.
    """
    slots = channels.others
    if channels.scope == "mlp":
        slots = tuple(
            one for one in slots if (".gate_up_proj." in one.tensor and one.start) or ".up_proj." in one.tensor
        )
        gated = any(".gate_up_proj." in one.tensor or ".gate_proj." in one.tensor for one in channels.others)
        if not gated or not slots:
            return None
    reader = channels.readers[0]
    places = reader.places(channels.sets, channels.size)  # (sets, repeat, size)
    ids = torch.arange(channels.sets * channels.size).view(channels.sets, 1, channels.size)
    columns = torch.empty(places.numel(), dtype=torch.int64)
    columns[places.flatten()] = ids.expand_as(places).flatten()
    rows = {slot.tensor: slot.places(channels.sets, channels.size).flatten() for slot in slots}
    into = slots[0].tensor.rpartition(".")[0]
    return Fold(into, (channels.name,), columns, rows)
