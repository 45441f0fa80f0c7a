"""Find the channels of a model that may be put in another order, or scaled, for free: where each lies in which tensors.

Names give a hint, shapes must bear it out, and whatever else a module holds must be known to be indifferent to the
order; what is not recognised is left alone. That the model still computes the same is then measured, not believed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.core.pattern import NM
from compressllm.models.blocks import all_linears, find_blocks

Scope = Literal["mlp", "attention", "residual"]


@dataclass(frozen=True)
class Slot:
    """Where sets of channels lie along one axis of a tensor.

    Channel ``i`` of set ``s`` is at ``start + (s * repeat + k) * stride + i`` for each ``k < repeat``.

    Args:
        tensor: Name of the parameter.
        axis: 0 for rows, 1 for columns.
        start: Where the first set begins.
        stride: From one set to the next; None if they lie end to end.
        repeat: How often each set comes, one after the other.
    """

    tensor: str
    axis: int
    start: int = 0
    stride: int | None = None
    repeat: int = 1

    def places(self, sets: int, size: int) -> Tensor:
        """(sets, repeat, size) int64: where each channel lies along the axis."""
        copies = torch.arange(sets * self.repeat).view(sets, self.repeat, 1)
        return self.start + copies * (self.stride or size) + torch.arange(size)


@dataclass(frozen=True)
class Channels:
    """Sets of channels that may each be put in any order, if all tensors that hold them follow.

    Args:
        name: The linear that reads them, or ``residual``.
        scope: What they lie inside of.
        sets: How many sets there are, each with an order of its own: one a key head in attention, else one.
        size: Channels in a set.
        readers: Columns of linears, whose scores an order is chosen by.
        others: All else that has to follow.
    """

    name: str
    scope: Scope
    sets: int
    size: int
    readers: tuple[Slot, ...]
    others: tuple[Slot, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every place the channels have."""
        return self.readers + self.others


class Found(NamedTuple):
    """The channels of a model, front to back, and what was left alone: scope -> why, one line each."""

    channels: list[Channels]
    left: dict[Scope, list[str]]


class _Unknown(Exception):
    """Something whose part in the order of channels is not known; the message says what."""


@dataclass(frozen=True)
class _Unit:
    """An attention or an MLP: linears that read the residual stream, one that writes to it, and what lies between."""

    inputs: tuple[str, ...]
    output: str
    inner: Channels | None  # None if its own channels cannot be reordered, though it is known what it reads and writes
    reason: str  # then why
    indifferent: frozenset[str] = frozenset()  # tensors that do not care


# Linears of one module: what reads the module's input, and what writes its output. In a fused matrix the parts that
# the second name's columns belong to come as the code of the models says: gate before up, and value after key.
_ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")),
    (("qkv_proj",), ("o_proj",)),  # all queries, all keys, all values: Phi-3
    (("query_key_value",), ("dense",)),  # query, key and value of one head after the other: GPT-NeoX, BLOOM
)
_MLPS = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("gate_up_proj",), ("down_proj",)),
    (("up_proj",), ("down_proj",)),
    (("fc1",), ("fc2",)),
    (("c_fc",), ("c_proj",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
)
_HEAD_NORM = re.compile(r"(q|k|query|key)_?(layer)?norm\.(weight|bias)")  # before the product of queries and keys
_STREAM_NORM = re.compile(r"(RMS|Layer)Norm")


def find_channels(model: PreTrainedModel, scope: Collection[Scope], pattern: NM) -> Found:
    """The channels in ``scope`` whose order is free, and what was not recognised.

    Args:
        pattern: Its groups have to fit into each set.

    Raises: UnsupportedModelError if blocks or linears cannot be handled at all.
    """
    all_linears(model)  # refuses tied and fused ones
    blocks = find_blocks(model)
    units: dict[str, list[_Unit]] = {}
    found, left = [], {one: [] for one in scope}  # type: tuple[list[Channels], dict[Scope, list[str]]]
    for index, block in enumerate(blocks.modules):
        name = blocks.name(index)
        units[name] = []
        for kind, table in (("attention", _ATTENTIONS), ("mlp", _MLPS)):
            own = list(_units(block, name, table))
            units[name] += own
            if kind not in left:
                continue
            if not own:
                left[kind].append(f"{name}: no {kind} of a known form")
            for unit in own:
                if unit.inner is None:
                    left[kind].append(f"{unit.output}: {unit.reason}")
                elif unit.inner.size % pattern.m:
                    left[kind].append(f"{unit.output}: {unit.inner.size} channels are no multiple of {pattern.m}")
                else:
                    found.append(unit.inner)
    if "residual" in left:
        try:
            residual = _residual(model, units)
            if residual.size % pattern.m:
                raise _Unknown(f"{residual.size} channels are no multiple of {pattern.m}")
            found.append(residual)
        except _Unknown as reason:
            left["residual"].append(f"residual stream: {reason}")
    return Found(found, left)


def _units(
    block: nn.Module, prefix: str, table: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
) -> Iterator[_Unit]:
    """The attentions or MLPs of a block."""
    for path, module in block.named_modules():
        linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for inputs, outputs in table:
            output = next((name for name in outputs if name in linears), None)
            if output is not None and all(name in linears for name in inputs):
                base = f"{prefix}.{path}." if path else f"{prefix}."
                alone = module is not block
                yield _unit(module, base, inputs, output, alone, attention=table is _ATTENTIONS)
                break


def _unit(module: nn.Module, base: str, inputs: tuple[str, ...], output: str, alone: bool, attention: bool) -> _Unit:
    names, last = tuple(base + name for name in inputs), base + output
    known = tuple(f"{name}." for name in (*inputs, output))
    extra = [key for key in module.state_dict(keep_vars=True) if not key.startswith(known)] if alone else []
    norms = frozenset(base + key for key in extra if attention and _HEAD_NORM.fullmatch(key))
    try:
        if strange := [key for key in extra if base + key not in norms]:
            raise _Unknown(f"{base}{strange[0]} has no known part in it")
        make = _attention if attention else _mlp
        return _Unit(names, last, make(module, base, inputs, output), "", norms)
    except _Unknown as reason:
        return _Unit(names, last, None, str(reason), norms)


def _mlp(module: nn.Module, base: str, inputs: tuple[str, ...], output: str) -> Channels:
    size = _linear(module, output).in_features
    if inputs == ("gate_up_proj",):
        starts = [("gate_up_proj", 0), ("gate_up_proj", size)]
    else:
        starts = [(name, 0) for name in inputs]
    rows = {name: size * sum(one == name for one, _ in starts) for name, _ in starts}
    _expect_rows(module, base, rows)
    others = [slot for name, start in starts for slot in _rows(module, base, name, start)]
    return Channels(base + output, "mlp", 1, size, (Slot(f"{base}{output}.weight", 1),), tuple(others))


def _attention(module: nn.Module, base: str, inputs: tuple[str, ...], output: str) -> Channels:
    width = _linear(module, output).in_features
    size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if not isinstance(size, int) or width % size:
        raise _Unknown("the size of a head is not known")
    heads, stride = width // size, size
    if inputs == ("q_proj", "k_proj", "v_proj"):
        source, start, key_heads = "v_proj", 0, _linear(module, "v_proj").out_features // size
        rows = {"q_proj": width, "k_proj": key_heads * size, "v_proj": key_heads * size}
    elif inputs == ("qkv_proj",):
        source, key_heads = "qkv_proj", (_linear(module, "qkv_proj").out_features - width) // (2 * size)
        start, rows = (heads + key_heads) * size, {source: (heads + 2 * key_heads) * size}
    else:
        source, key_heads, start, stride, rows = "query_key_value", heads, 2 * size, 3 * size, {}
        rows = {source: 3 * width}
    if key_heads < 1 or heads % key_heads:
        raise _Unknown(f"{heads} query heads do not share {key_heads} value heads evenly")
    _expect_rows(module, base, rows)
    reader = Slot(f"{base}{output}.weight", 1, repeat=heads // key_heads, stride=size)
    others = tuple(_rows(module, base, source, start, stride))
    return Channels(base + output, "attention", key_heads, size, (reader,), others)


def _expect_rows(module: nn.Module, base: str, rows: dict[str, int]) -> None:
    for name, expected in rows.items():
        if (given := _linear(module, name).out_features) != expected:
            raise _Unknown(f"{base}{name} has {given} rows, {expected} are expected")


def _rows(module: nn.Module, base: str, name: str, start: int = 0, stride: int | None = None) -> Iterator[Slot]:
    """The rows of a linear, bias included."""
    for kind in ("weight", "bias") if _linear(module, name).bias is not None else ("weight",):
        yield Slot(f"{base}{name}.{kind}", 0, start, stride)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is no linear")
    return linear


def _residual(model: PreTrainedModel, units: dict[str, list[_Unit]]) -> Channels:
    """The residual stream, if every tensor of the model has a known part in it. Raises _Unknown."""
    hidden: int = model.config.get_text_config().hidden_size
    readers: list[Slot] = []
    others: list[Slot] = []
    indifferent: set[str] = set()
    for name, own in units.items():
        if len(own) < 2:
            raise _Unknown(f"not all that reads and writes it in {name} is known")
        for unit in own:
            for linear in unit.inputs:
                if _linear(model, linear).in_features != hidden:
                    raise _Unknown(f"{linear} has {_linear(model, linear).in_features} inputs, not {hidden}")
                readers.append(Slot(f"{linear}.weight", 1))
                indifferent.add(f"{linear}.bias")
            if _linear(model, unit.output).out_features != hidden:
                raise _Unknown(f"{unit.output} has {_linear(model, unit.output).out_features} outputs, not {hidden}")
            others += _rows(model, "", unit.output)
            indifferent |= unit.indifferent
    seen = {slot.tensor for slot in readers + others} | indifferent
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in seen or tensor.numel() == 1:
            continue
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, nn.Embedding) and tensor.dim() == 2 and tensor.shape[1] == hidden:
            others.append(Slot(name, 1))
        elif module is model.get_output_embeddings() and isinstance(module, nn.Linear) and module.in_features == hidden:
            others += [Slot(name, 1)] if kind == "weight" else []
        elif tensor.shape == (hidden,) and _STREAM_NORM.search(type(module).__name__):
            others.append(Slot(name, 0))
        else:
            raise _Unknown(f"{name} has no known part in it")
    return Channels("residual", "residual", 1, hidden, tuple(readers), tuple(others))
