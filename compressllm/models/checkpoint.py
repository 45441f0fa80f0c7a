"""A checkpoint folder: its tensors one at a time, whatever format its sparse linears are stored in."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from compressllm.core import stockcodes
from compressllm.core.errors import FormatError, UnsupportedModelError
from compressllm.core.masks import MaskStore, PackedMask, StoredMask
from compressllm.core.packedcodes import ORDER, SCALES, unpack_codes
from compressllm.core.protocols import FORMATS
from compressllm.core.quantized import QuantizedWeight
from compressllm.core.registry import build
from compressllm.core.scheme import parse_scheme
from compressllm.models.facts import FILE_NAME, Facts, read_facts
from compressllm.models.shards import ShardReader
from compressllm.models.sidefiles import SUFFIXES, check_side_files, inside, read_json
from compressllm.models.sourcecard import card_facts
from compressllm.models.tensorfile import TensorFile, TensorFileWriter, TensorSpec

MASKS_NAME = "masks.safetensors"
ADAPTER_CONFIG = "adapter_config.json"  # what PEFT writes beside an adapter


class Checkpoint:
    """Read-only view of a checkpoint folder: dense, packed, or exported for compressed-tensors.

    Sparse linears stored packed are decoded as they are read, and quantised ones rounded to the dtype they had, so
    every reader sees plain weights; `quantized` gives the codes.

    Raises: FormatError if the folder is not a whole checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / ADAPTER_CONFIG).exists():
            raise FormatError(
                f"{folder}: holds an adapter of PEFT, not a model; merged plainly, a LoRA fills the zeros of a pruned "
                "model: train with adapter masklora, or see `compressllm merge-lora --masked`"
            )
        if not (folder / "config.json").exists():
            raise FormatError(f"{folder}: holds no config.json, so it is not a model folder")
        check_side_files(folder)
        self.facts: Facts | None = read_facts(folder)
        self._shards = ShardReader(folder, self.facts.variant if self.facts else None)
        plain = self.facts is None or self.facts.format in {"dense", stockcodes.FORMAT}
        self._format = None if self.facts is None or plain else build(FORMATS, self.facts.format)
        self._packed = dict(self.facts.linears) if self.facts and self._format else {}
        self._stock = dict(self.facts.linears) if self.facts and self.facts.format == stockcodes.FORMAT else {}
        self._masks = TensorFile(inside(folder, MASKS_NAME)) if (folder / MASKS_NAME).exists() else None

    def config(self) -> PreTrainedConfig:
        """The model's config. Raises FormatError if it cannot be read, UnsupportedModelError if it is quantised."""
        config = self._stored_config()
        quantization = getattr(config, "quantization_config", None)
        if (self._format is not None or self._stock) and hasattr(config, "quantization_config"):
            del config.quantization_config  # what we read is plain weights, and so is what is built from this config
        elif quantization:
            described = quantization if isinstance(quantization, dict) else quantization.to_dict()
            mend = "dequantise it first, or start from the original weights"
            if described.get("sparsity_config"):
                mend = "if its zeros are stored as a bitmask, `compressllm convert` reads it"
            raise UnsupportedModelError(f"{self.folder}: is quantised ({described.get('quant_method')}); {mend}")
        return config

    def _stored_config(self) -> PreTrainedConfig:
        """The config as it is written. Raises FormatError if it cannot be read, UnsupportedModelError if it is code."""
        path = self.folder / "config.json"
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise FormatError(f"{path}: holds no mapping of settings")
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except StrictDataclassError as error:  # only its second line says what is wrong
            raise FormatError(f"{path}: {' '.join(str(error).split())}") from None
        except Exception as error:  # of settings that make no sense transformers raises whatever it stumbles over
            if "auto_map" in settings:
                raise UnsupportedModelError(
                    f"{path}: its architecture is Python code beside the weights (auto_map), which is never run; "
                    "convert the model to an architecture that transformers knows"
                ) from None
            raise FormatError(f"{path}: {first_line(error)}") from None

    @property
    def origin(self) -> dict[str, Any]:
        """Where the weights came from, as far as is known: what our facts of the folder say, and its model card."""
        return {**card_facts(self.folder), **(self.facts.source if self.facts else {})}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> dtype and shape of every tensor, packed linears as the plain ``.weight`` they stand for."""
        stored = self._shards.specs
        if self._format is None:
            return stored if not self._stock else self._stock_specs(stored)
        specs: dict[str, TensorSpec] = {}
        for name, spec in stored.items():
            owner, _, part = name.rpartition(".")
            if owner not in self._packed or part not in (*self._format.tensors, SCALES, ORDER):
                specs[name] = spec
            elif part == ("weight" if self._packed[owner].scheme else self._format.tensors[0]):
                specs[f"{owner}.weight"] = TensorSpec(spec.dtype, self._packed[owner].stored_shape)
        return specs

    @property
    def stored_specs(self) -> dict[str, TensorSpec]:
        """Name -> dtype and shape of the tensors as they lie on disk."""
        return self._shards.specs

    @property
    def files(self) -> list[Path]:
        """Every file that holds weights or masks."""
        masks = [self.folder / MASKS_NAME] if self._masks else []
        return [self.folder / name for name in sorted(self._shards.files)] + masks

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor. Raises FormatError if it is missing or damaged."""
        owner = name.removesuffix(".weight")
        if owner != name and owner in self._stock and self._stock[owner].scheme:
            return self.quantized(owner).dequantize()
        if owner == name or owner not in self._packed or self._format is None:
            return self._shards.read(name)
        if self._packed[owner].scheme:
            weight = self.quantized(owner).dequantize()
        else:
            weight = self._format.unpack(owner, self._shards.read, self._packed[owner].shape)
        return weight.T.contiguous() if self._packed[owner].transposed else weight

    def quantized(self, linear: str) -> QuantizedWeight:
        """The codes and scales of a linear that the facts give a scheme of. Raises FormatError if they are damaged."""
        if linear in self._stock:
            facts = self._stock[linear]
            return stockcodes.unpack_stock(linear, self._shards.read, facts.shape, parse_scheme(str(facts.scheme)))
        dtype, scheme = self._shards.read(f"{linear}.weight").dtype, parse_scheme(str(self._packed[linear].scheme))
        ordered = f"{linear}.{ORDER}" in self._shards.specs
        return unpack_codes(linear, self._shards.read, self._packed_keep(linear), dtype, scheme.dynamic, ordered)

    def mask(self, linear: str) -> Tensor | None:
        """The stored (out, in) bool mask of a linear, or None if it has none."""
        if linear in self._stock:  # which holds no masks; what is zero is as good as pruned
            dense = not self._stock[linear].pattern.sparsity
            return torch.ones(self._stock[linear].shape).bool() if dense else self.read(f"{linear}.weight") != 0
        if linear in self._packed and self._format is not None:
            return self._format.mask(linear, self._shards.read, self._packed[linear].shape)
        if self._masks is None or linear not in self._masks.specs:
            return None
        return self._packed_mask(linear).keep()

    def masks(self) -> MaskStore:
        """All stored masks, in the model's order; those of packed linears stay on disk until they are asked for."""
        if held := self._packed or self._stock:
            keep = {name: functools.partial(self._packed_keep, name) for name in held}
            return MaskStore({name: StoredMask(keep[name], facts.shape) for name, facts in held.items()})
        names = [] if self._masks is None else [n for n in self._linear_names() if n in self._masks.specs]
        return MaskStore({name: self._packed_mask(name) for name in names})

    def copy_side_files(self, to: Path) -> None:
        """Copy config, tokenizer and other small files, but no weights and nothing of ours."""
        for path in sorted(self.folder.iterdir()):
            if path.name == FILE_NAME or ".index." in path.name:  # an index of shards, pickled ones included
                continue
            if path.is_file() and path.suffix in SUFFIXES:
                shutil.copyfile(path, to / path.name)
        if self._format is not None or self._stock:
            config = json.loads((to / "config.json").read_text())
            config.pop("quantization_config", None)  # what is written beside it need not be what it says
            (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _stock_specs(self, stored: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for name, spec in stored.items():
            owner, _, part = name.rpartition(".")
            if part not in stockcodes.PARTS or owner not in self._stock or not self._stock[owner].scheme:
                specs[name] = spec
            elif part == "weight_scale":  # has the dtype that the weight had
                specs[f"{owner}.weight"] = TensorSpec(spec.dtype, self._stock[owner].shape)
        return specs

    def _packed_keep(self, linear: str) -> Tensor:
        if (keep := self.mask(linear)) is None:
            raise FormatError(f"{self.folder}: holds no mask of {linear}; export the model again")
        return keep

    def _linear_names(self) -> list[str]:
        return list(self.facts.linears) if self.facts else sorted(self._masks.specs) if self._masks else []

    def _packed_mask(self, linear: str) -> PackedMask:
        weight = self.specs.get(f"{linear}.weight")
        if self._masks is None or weight is None:
            raise FormatError(f"{self.folder / MASKS_NAME}: has a mask of {linear}, which the checkpoint lacks")
        bits = self._masks.read(linear)
        facts = self.facts.linears.get(linear) if self.facts else None
        shape = weight.shape[::-1] if facts and facts.transposed else weight.shape
        out, columns = shape if len(shape) == 2 else (0, 0)
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (out, -(-columns // 8)):
            raise FormatError(
                f"{self.folder / MASKS_NAME}: the mask of {linear} does not fit its weight {weight.shape}"
            )
        return PackedMask(bits, columns)


def write_masks(path: Path, masks: MaskStore | Mapping[str, PackedMask | StoredMask]) -> None:
    """Write masks as ``name -> (out, ceil(in / 8)) uint8``, lowest bit first."""
    packed = {name: masks.packed(name) if isinstance(masks, MaskStore) else masks[name] for name in masks}
    writer = TensorFileWriter(path, {name: TensorSpec(m.bits.dtype, tuple(m.bits.shape)) for name, m in packed.items()})
    for name, mask in packed.items():
        writer.write(name, mask.bits)
    writer.close()


def first_line(error: BaseException) -> str:
    """An exception's first non-empty line, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
