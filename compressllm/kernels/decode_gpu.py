"""Triton: 2:4 weights decoded in registers, for few tokens at a time."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.masks import raw
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight, dequantize
from compressllm.kernels.gpu.choices import Choices, bucket
from compressllm.kernels.gpu.configs import Config, candidates, default_config, fastest_of
from compressllm.kernels.gpu.layout import (
    fits_2to4,
    pack_meta,
    pack_values,
    unpack_meta,
    unpack_values,
)

_SIXTEEN = (torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("compressllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "triton_2to4(Tensor x, Tensor values, Tensor meta, Tensor? scales, Tensor? bias) -> Tensor"
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


@BACKENDS.register("triton")
@dataclass(frozen=True)
class Triton:
    """2:4 and sparser on CUDA for few tokens, reading only kept weights: 16 bit, fp8, and int8 or int4 with scales."""

    rank: ClassVar[int] = -1  # without a measurement dense goes first
    rounds_up_to: ClassVar[float] = 0

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse other patterns and dtypes, and machines without triton and a GPU of compute capability 8 or 9."""
        if not fits_2to4(pattern) or weight.shape[1] % 4:
            return (
                f"computes weights of at most 2 in every 4 inputs; this one is {pattern} with {weight.shape[1]} inputs"
            )
        if weight.dtype not in (*_SIXTEEN, torch.float8_e4m3fn):
            return f"computes 16-bit and float8_e4m3fn weights, and quantised ones in 16 bit, not {weight.dtype}"
        return unavailable(weight.device) or (
            None if wanted else "was slower than sparse-mma wherever both were measured"
        )

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """``meta``, ``values`` as `gpu.layout` has them, and ``scales`` (groups, out) float32 seen as integers."""
        if isinstance(weight, QuantizedWeight):
            codes = (weight.codes.short() + (1 << (weight.bits - 1))).to(torch.uint8)
            values, meta = pack_values(codes, keep, weight.bits), pack_meta(keep, weight.bits)
            return {"values": values, "meta": meta, "scales": raw(weight.scales.T.contiguous())}
        bits = 8 * weight.dtype.itemsize
        weight = weight.masked_fill(~keep, 0) if bits == 16 else weight.view(torch.uint8) * keep
        return {"values": pack_values(weight, keep, bits), "meta": pack_meta(keep, bits)}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight; a quantised one in float32."""
        values, meta = packed["values"], packed["meta"]
        bits = bits_of(values, meta)
        weight = unpack_values(values, meta, bits, columns)
        if "scales" not in packed:
            return weight if bits == 16 else weight.view(torch.float8_e4m3fn)
        codes = (weight.short() - (1 << (bits - 1))) * unpack_meta(meta, bits, columns)
        scales = packed["scales"].view(torch.float32).T
        return dequantize(codes.to(torch.int8), scales, group_size(scales.shape[1], columns) or columns)

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). Raises BackendUnavailableError for activations it cannot take."""
        values, meta = packed["values"], packed["meta"]
        if x.dtype not in _SIXTEEN or values.dtype not in (x.dtype, torch.uint8):
            wanted = "bfloat16 or float16" if values.dtype == torch.uint8 else values.dtype
            raise BackendUnavailableError(
                f"backend triton: activations are {x.dtype}, the weight was packed for {wanted}; load the model in that"
            )
        scales = packed["scales"].view(torch.float32) if "scales" in packed else None
        rows = x.reshape(-1, x.shape[-1])
        return torch.ops.compressllm.triton_2to4(rows, values, meta, scales, bias).view(*x.shape[:-1], len(meta))  # type: ignore[no-any-return]


def unavailable(device: torch.device) -> str | None:
    """Why triton cannot run on this device, or None."""
    if device.type != "cuda":
        return f"runs on CUDA devices; the weight is on {device.type}"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {torch.cuda.get_device_name(device)}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which comes with torch for CUDA; run: pip install triton"
    return None


def bits_of(values: Tensor, meta: Tensor) -> int:
    """Bits of a value: 16, 8 or 4."""
    return 16 if values.dtype in _SIXTEEN else 4 * values.shape[1] // (8 * meta.shape[1])


def group_size(groups: int, columns: int) -> int:
    """Columns that share a scale, of 32, 64 and 128; 0 if one is the whole row's."""
    return 0 if groups == 1 else next(size for size in (32, 64, 128) if -(-columns // size) == groups)


def _kernel() -> ModuleType:
    return importlib.import_module("compressllm.kernels.gpu.triton_matmul")


@functools.cache
def _choices(device: torch.device) -> Choices:
    facts = {"gpu": torch.cuda.get_device_name(device), "triton": importlib.import_module("triton").__version__}
    return Choices("triton", facts, always=False)


def _run(x: Tensor, values: Tensor, meta: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    kernel, x = _kernel(), x.contiguous()
    (tokens, columns), rows, tiles, bits = x.shape, len(meta), meta.shape[1] // 16, bits_of(values, meta)
    if not tokens or not rows:
        return x.new_empty(tokens, rows)
    group = -1 if scales is None else group_size(len(scales), columns)

    def compute(config: Config) -> Tensor:
        return kernel.matmul(x, values, meta, scales, bias, bits, group, config)  # type: ignore[no-any-return]

    if x.device.type != "cuda":  # triton's interpreter
        return compute(default_config(rows, tiles, tokens, bits, processors=1, shared=0))
    facts = torch.cuda.get_device_properties(x.device)
    shared = getattr(facts, "shared_memory_per_block_optin", 0)  # not in torch's stubs
    default = default_config(rows, tiles, tokens, bits, facts.multi_processor_count, shared)
    case = f"{rows}x{columns} {bits} bits, {x.dtype}, group {group}, {bucket(tokens, 16)} tokens"
    with torch.cuda.device(x.device):
        search = functools.partial(fastest_of, compute, candidates(tiles, bits, default), kernel.OutOfResources)
        return compute(Config(*_choices(x.device).get(case, search, default)))


def _like(x: Tensor, values: Tensor, meta: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], meta.shape[0])


torch.library.impl(_LIBRARY, "triton_2to4", "CompositeExplicitAutograd")(_run)
torch.library.register_fake("compressllm::triton_2to4", _like, lib=_LIBRARY)
