"""Checkpoints whose sparse linears compressed-tensors stored as kept values and bitmasks, before its version 0.15."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compressllm.core.errors import FormatError
from compressllm.core.masks import MaskStore, StoredMask, put_kept, unpack_bits
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import skeleton
from compressllm.models.sidefiles import read_json
from compressllm.models.tensorfile import TensorSpec
from compressllm.models.tensornames import tensor_names

BITMASKS: Final = ("sparse-24-bitmask", "sparse-bitmask")
_PLAIN: Final = ("dense", None)  # zeros in place
_KEYS: Final = ("quantization_config", "compression_config")  # the second until 2024
_PARTS: Final = ("compressed", "bitmask", "shape", "row_offsets")
_OF_CODES: Final = (
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "output_scale",
)


class BitmaskCheckpoint(Checkpoint):
    """A checkpoint in the format ``sparse-24-bitmask`` or ``sparse-bitmask``, seen as plain weights and masks.

    A compressed tensor ``T`` is stored as ``T.compressed``, its kept values in row-major order, ``T.bitmask``, uint8
    (out, ceil(in / 8)) with the lowest bit first, and ``T.shape``; ``sparse-bitmask`` adds ``T.row_offsets``, which
    follow from the mask. ``.weight`` is left out of ``T`` since 2025. The mask is trusted: under 2:4 a kept value may
    be zero. Codes of 8 bits, where the model was quantised as well, are multiplied by their scales into plain weights
    of the config's dtype.

    Raises: FormatError if the folder is none of these, or what it holds cannot be decoded.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        described = sparsity_config(folder)
        if described is None:
            raise FormatError(
                f"{folder}: config.json has no sparsity_config, so there is nothing to convert; "
                "plain checkpoints and exports go to `compressllm export`"
            )
        form = described.get("format")
        if form not in (*BITMASKS, *_PLAIN):
            why = "was never made to be read back" if form == "marlin-24" else "is not known"
            raise FormatError(f"{folder}: is stored as {form}, which {why}; {' and '.join(BITMASKS)} are converted")
        stored = super().specs
        self._dtype = _config_dtype(folder)
        self._stems = {_whole(name.removesuffix(".bitmask")): name.removesuffix(".bitmask") for name in stored
                       if name.endswith(".bitmask")}  # fmt: skip
        for name, stem in self._stems.items():
            if lost := next((part for part in _PARTS[:3] if f"{stem}.{part}" not in stored), None):
                raise FormatError(f"{folder}: {name} lacks its tensor {stem}.{lost}; fetch the checkpoint again")
        self._shapes = {name: _shape(self._shards.read(f"{stem}.shape"), name) for name, stem in self._stems.items()}
        if packed := next((name for name in stored if name.endswith((".weight_packed", ".scale_packed"))), None):
            raise FormatError(f"{folder}: {packed} is packed into 32-bit words, which is not converted")

    def config(self) -> PreTrainedConfig:
        """The model's config, as that of a plain model."""
        config = self._stored_config()
        for key in _KEYS:
            if hasattr(config, key):
                delattr(config, key)
        return config

    @property
    def quantised(self) -> bool:
        """Whether some weights are codes with scales."""
        return any(name.endswith(".weight_scale") for name in self._shards.specs)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name -> dtype and shape of every tensor, as plain weights."""
        parts = {f"{stem}.{part}" for stem in self._stems.values() for part in _PARTS}
        stored = self._shards.specs
        found = {name: spec for name, spec in stored.items() if name not in parts and not name.endswith(_OF_CODES)}
        for name, stem in self._stems.items():
            found[name] = TensorSpec(stored[f"{stem}.compressed"].dtype, self._shapes[name])
        return {
            name: TensorSpec(self._dtype, spec.shape) if self._scale_of(name) else spec for name, spec in found.items()
        }

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor. Raises FormatError if it is missing, or values and mask do not agree."""
        weight = self._decoded(name) if name in self._stems else self._shards.read(name)
        scale = self._scale_of(name)
        return self._dequantised(name, weight, scale) if scale else weight

    def mask(self, linear: str) -> Tensor | None:
        """The stored (out, in) bool mask of a linear, or None if it has none."""
        name = f"{linear}.weight"
        return self._keep(name) if name in self._stems and len(self._shapes[name]) == 2 else None

    def masks(self) -> MaskStore:
        """The masks of the decoder blocks' linears, in the model's order, left on disk."""
        model = skeleton(self)
        stored = tensor_names(model, self)
        names = [stored[f"{linear}.weight"] for linear in all_linears(model)]
        return MaskStore(
            {
                name.removesuffix(".weight"): StoredMask(lambda name=name: self._keep(name), self._shapes[name])  # type: ignore[misc, arg-type]
                for name in names
                if name in self._stems
            }
        )

    def copy_side_files(self, to: Path) -> None:
        """Copy config, tokenizer and other small files, without what the config says of compression."""
        super().copy_side_files(to)
        config = read_json(to / "config.json")
        for key in (*_KEYS, "sparsity_config"):
            config.pop(key, None)
        (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _keep(self, name: str) -> Tensor:
        """The mask of a tensor in its shape."""
        shape, bits = self._shapes[name], self._shards.read(f"{self._stems[name]}.bitmask")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if bits.dtype != torch.uint8 or bits.numel() != rows * -(-columns // 8):
            raise FormatError(f"{self.folder}: the bitmask of {name} does not fit its shape {shape}")
        return unpack_bits(bits.reshape(rows, -1), columns).view(shape)

    def _decoded(self, name: str) -> Tensor:
        values, keep = self._shards.read(f"{self._stems[name]}.compressed"), self._keep(name)
        if values.numel() != int(keep.count_nonzero()):
            raise FormatError(
                f"{self.folder}: {name} has {values.numel()} values, its bitmask keeps {int(keep.count_nonzero())}"
            )
        return put_kept(values, keep)

    def _scale_of(self, name: str) -> str | None:
        """The name of the scales that a tensor's codes are to be multiplied by."""
        scale = f"{name}_scale"
        return scale if name.endswith(".weight") and scale in self._shards.specs else None

    def _dequantised(self, name: str, codes: Tensor, scale: str) -> Tensor:
        scales = self._shards.read(scale).float()
        zero = name + "_zero_point"
        if zero in self._shards.specs and self._shards.read(zero).float().any():
            raise FormatError(f"{self.folder}: {name} has zero points; only symmetric codes are converted")
        if scales.numel() not in (1, codes.shape[0]):
            raise FormatError(
                f"{self.folder}: {name} has {scales.numel()} scales; one a tensor or one a row is converted"
            )
        return (codes.float() * scales.reshape(-1, 1)).to(self._dtype)


def sparsity_config(folder: Path) -> Mapping[str, Any] | None:
    """What a checkpoint's config says of how its zeros are stored; None if it says nothing."""
    try:
        config = read_json(folder / "config.json")
        holders = [config.get(key) or {} for key in _KEYS] + [config]
        found = next((one["sparsity_config"] for one in holders if one.get("sparsity_config")), None)
    except (FormatError, AttributeError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _whole(stem: str) -> str:
    """The tensor that parts are of; a linear's own name stands for its weight."""
    return stem if stem.rpartition(".")[2] in {"weight", "bias"} else f"{stem}.weight"


def _shape(stored: Tensor, name: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in stored.flatten())
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise FormatError(f"{name}: is stored as having shape {shape}; vectors and matrices are converted")
    return shape


def _config_dtype(folder: Path) -> torch.dtype:
    config = read_json(folder / "config.json")
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16
