"""Merge a plain LoRA into a pruned model, under its masks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressllm import __version__
from compressllm.core.errors import FormatError
from compressllm.models.checkpoint import ADAPTER_CONFIG, Checkpoint
from compressllm.models.facts import Facts
from compressllm.models.linears import held_otherwise
from compressllm.models.loading import skeleton
from compressllm.models.tensorfile import TensorFile
from compressllm.models.tensornames import tensor_names

_PREFIX, _FILE = "base_model.model.", "adapter_model.safetensors"


class _Update(NamedTuple):
    """Of one linear: names of A and B in the adapter's file, the update's factor, and how the weight is stored."""

    lora_a: str
    lora_b: str
    scale: float
    transposed: bool


class MaskedMerge(Checkpoint):
    """A pruned checkpoint with a PEFT LoRA merged into it as W + s * keep * (B A), read tensor by tensor.

    The LoRA was trained as if its whole update would count, and what falls on pruned weights is dropped: what is
    merged is not what was trained. `dropped` says how much of it that is.

    Raises: FormatError for a model without masks, a folder that is no LoRA of PEFT, a variant of it that cannot be
        merged so, and an adapter of another model.

    Source: Zimmer et al., PERP, 2023, where this is LoRA-Prune.
    """

    def __init__(self, student: Path, adapter: Path) -> None:
        super().__init__(student)
        if not self.masks():
            raise FormatError(f"{student}: holds no masks; `compressllm export` finds its zeros and writes them")
        settings = _settings(adapter)
        self._adapter = TensorFile(adapter / _FILE)
        self._updates = _updates(self, adapter, settings, self._adapter)
        facts = self.facts or Facts(written_by=__version__)
        note = {"adapter": adapter.name, "linears": len(self._updates), "dropped": self.dropped()}
        self.facts = facts.model_copy(update={"source": {**facts.source, "merged": note}})

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor; an updated weight is computed in float32 and rounded once."""
        weight = super().read(name)
        if name not in self._updates:
            return weight
        delta, keep = self._delta(name), self.mask(name.removesuffix(".weight"))
        if keep is not None:
            delta.masked_fill_(~keep, 0.0)
        return (weight.float() + (delta.T if self._updates[name].transposed else delta)).to(weight.dtype)

    def dropped(self) -> float:
        """Fraction of the squared norm of all updates that falls on pruned weights."""
        lost = total = 0.0
        for name in self._updates:
            squares, keep = self._delta(name).square_(), self.mask(name.removesuffix(".weight"))
            total += float(squares.sum(dtype=torch.float64))
            lost += 0.0 if keep is None else float(squares.masked_fill_(keep, 0.0).sum(dtype=torch.float64))
        return lost / total if total else 0.0

    def _delta(self, name: str) -> Tensor:
        """The whole update s * (B A), (out, in) float32."""
        update = self._updates[name]
        lora_a, lora_b = (self._adapter.read(each).float() for each in (update.lora_a, update.lora_b))
        return (lora_b @ lora_a).mul_(update.scale)


def _settings(adapter: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((adapter / ADAPTER_CONFIG).read_text())
        kind, alpha = settings["peft_type"], float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError):
        raise FormatError(f"{adapter}: holds no {ADAPTER_CONFIG} of a LoRA of PEFT") from None
    special = [key for key in ("use_dora", "alpha_pattern", "modules_to_save") if settings.get(key)]
    if kind != "LORA" or special:
        what = f"with {special[0]}" if special else f"of kind {kind}"
        raise FormatError(f"{adapter}: is an adapter {what}; only plain LoRA can be merged under masks")
    return settings | {"lora_alpha": alpha}


def _updates(student: Checkpoint, adapter: Path, settings: dict[str, Any], file: TensorFile) -> dict[str, _Update]:
    """Name of the stored weight -> its update.

    Raises: FormatError for a tensor that is no part of a LoRA of the student's linears.
    """
    model = skeleton(student)
    stored, special = tensor_names(model, student), held_otherwise(model)
    updates: dict[str, _Update] = {}
    for name, spec in file.specs.items():
        linear, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        weight = f"{linear}.weight"
        if part not in {"A.weight", "B.weight"} or weight not in stored:
            raise FormatError(f"{adapter / _FILE}: {name} is no LoRA of a linear that {student.folder} has")
        if part == "B.weight":
            continue
        other = f"{name.removesuffix('A.weight')}B.weight"
        transposed = weight in special and special[weight].transposed
        shape = student.specs[stored[weight]].shape
        rank = spec.shape[0]
        expected = {name: (rank, shape[not transposed]), other: (shape[transposed], rank)}
        for each, wanted in expected.items():
            if each not in file.specs or file.specs[each].shape != wanted:
                raise FormatError(
                    f"{adapter / _FILE}: {each} has not shape {wanted}, as {weight} needs; is it of another model?"
                )
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        updates[stored[weight]] = _Update(name, other, scale, transposed)
    if not updates:
        raise FormatError(f"{adapter / _FILE}: holds no LoRA")
    return updates
