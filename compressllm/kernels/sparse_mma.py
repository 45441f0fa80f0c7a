"""sparse-mma: 2:4 weights straight into sparse tensor cores, for few tokens at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.masks import raw
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import QuantizedWeight, dequantize
from compressllm.kernels.gpu import nvrtc
from compressllm.kernels.gpu.choices import Choices, bucket, fastest
from compressllm.kernels.gpu.fragments import ROWS, TILE, pack_fragments, unpack_fragments
from compressllm.kernels.gpu.layout import fits_2to4

_SOURCE = Path(__file__).parent / "gpu" / "sparse_mma.cu"
#: 16-bit dtype -> the integers fragments of it are held as: they tell the dtypes apart, and survive a module's cast.
_HELD_AS = {torch.bfloat16: torch.int16, torch.float16: torch.uint16}
_DTYPE_OF = {held: dtype for dtype, held in _HELD_AS.items()}
_STAGED_BY_DEFAULT = 32 << 10
_SUMS = 40 << 10  # of shared memory, at most, for what the warps add up
_MANY = 96  # tokens from which expanding the weight costs less than what sparse products of few tokens do
_UNIT = 8  # inputs: a lane reads 16 bytes of activations at a time
_LIBRARY = torch.library.Library("compressllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("sparse_mma(Tensor x, Tensor fragments, Tensor? scales, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


class Config(NamedTuple):
    """How the work is cut up.

    Args:
        row_tiles: Times 16 rows a block computes at a time.
        token_tiles: Times 8 tokens it computes.
        warps: Warps that share its columns.
        ahead: Tiles a warp has on their way.
        staged: 1 if a block keeps its tokens' activations in shared memory.
    """

    row_tiles: int
    token_tiles: int
    warps: int
    ahead: int
    staged: int


@BACKENDS.register("sparse-mma")
@dataclass(frozen=True)
class SparseMma:
    """2:4 and sparser on sparse tensor cores, for few tokens: 16 bit, fp8, and int8 or int4 with scales.

    Of many tokens the product is dense, with a weight expanded for it.
    """

    rank: ClassVar[int] = -1  # without a measurement dense goes first
    rounds_up_to: ClassVar[float] = 0

    def refuses(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, wanted: bool = False) -> str | None:
        """Refuse other patterns, shapes and dtypes, and machines without NVRTC and a GPU with sparse tensor cores."""
        if not fits_2to4(pattern):
            return f"computes weights of at most 2 in every 4 inputs; this one is {pattern}"
        if weight.shape[0] % ROWS or weight.shape[1] % _UNIT:
            return (
                f"needs outputs in multiples of {ROWS} and inputs in multiples of {_UNIT}; "
                f"this weight is {weight.shape[0]} x {weight.shape[1]}"
            )
        if weight.dtype not in (*_HELD_AS, torch.float8_e4m3fn):
            return f"computes 16-bit and float8_e4m3fn weights, and quantised ones in 16 bit, not {weight.dtype}"
        return _unavailable(weight.device)

    def pack(self, weight: Tensor | QuantizedWeight, keep: Tensor) -> dict[str, Tensor]:
        """``fragments`` as `gpu.fragments` has them, and ``scales`` (groups, out) float32 seen as integers."""
        if isinstance(weight, QuantizedWeight):
            fragments = pack_fragments(weight.codes, keep, weight.bits)
            return {"fragments": fragments, "scales": raw(weight.scales.T.contiguous())}
        fragments = pack_fragments(weight, keep, 8 * weight.dtype.itemsize)
        return {"fragments": fragments.view(_HELD_AS.get(weight.dtype, torch.int32))}

    def unpack(self, packed: Mapping[str, Tensor], columns: int) -> Tensor:
        """The (out, in) weight; a quantised one in float32."""
        fragments, bits = packed["fragments"], bits_of(packed["fragments"])
        rows = ROWS * len(fragments)
        weight = unpack_fragments(fragments.view(torch.int32), rows, columns, bits)
        if "scales" not in packed:
            return weight.view(_DTYPE_OF.get(fragments.dtype, torch.float8_e4m3fn))
        scales = packed["scales"].view(torch.float32).T
        return dequantize(weight, scales, group_size(scales.shape[1], columns) or columns)

    def linear(self, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out). Raises BackendUnavailableError for activations it cannot take."""
        fragments = packed["fragments"]
        if x.dtype not in _HELD_AS or fragments.dtype not in (_HELD_AS[x.dtype], torch.int32):
            wanted = _DTYPE_OF.get(fragments.dtype, "bfloat16 or float16")
            raise BackendUnavailableError(
                f"backend sparse-mma: activations are {x.dtype}, the weight was packed for {wanted}; load the model in "
                "that"
            )
        scales = packed["scales"].view(torch.float32) if "scales" in packed else None
        bias = None if bias is None else bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        result: Tensor = torch.ops.compressllm.sparse_mma(rows, fragments, scales, bias)
        return result.view(*x.shape[:-1], result.shape[-1])


def bits_of(fragments: Tensor) -> int:
    """Bits of a value: 16, 8 or 4."""
    return 2 * (fragments.shape[2] - 1)


def group_size(groups: int, columns: int) -> int:
    """Columns that share a scale, of 32, 64 and 128; 0 if one is the whole row's."""
    return 0 if groups == 1 else next(size for size in (32, 64, 128) if -(-columns // size) == groups)


def default_config(rows: int, tiles: int, tokens: int, processors: int, shared: int) -> Config:
    """What searches on an H200 mostly found: enough warps to have their share of the weight on its way at once.

    Past 8 tokens activations are what takes the time, and 32 rows share them.

    Args:
        processors: Multiprocessors of the GPU.
        shared: Bytes of shared memory that a block may have.
    """
    blocks = rows // ROWS
    if tokens > 8:
        warps = 2 if blocks >= 4 * processors else 4 if tiles <= 32 else 8
        return Config(2 if blocks >= processors else 1, 2, min(tiles, warps), 1, 0)
    warps = 16 if blocks < processors else 8 if blocks < 4 * processors else 4
    staged = staged_bytes(tiles, tokens, 1) <= min(shared, _STAGED_BY_DEFAULT)
    return Config(1, 1, min(tiles, warps), 1, int(staged))


def candidates(default: Config, tiles: int, tokens: int, shared: int) -> list[Config]:
    """Ways worth measuring: more rows a block, more or fewer warps, more on the way, staged or not."""
    warps = sorted({w for w in (default.warps // 2, default.warps, 2 * default.warps) if 1 <= w <= min(16, tiles)})
    fits = staged_bytes(tiles, tokens, default.token_tiles) + _SUMS <= shared
    return [
        Config(rows, default.token_tiles, w, ahead, staged)
        for rows in (1, 2)
        for w in warps
        for ahead in (1, 2)
        for staged in ((0, 1) if fits else (0,))
    ]


def staged_bytes(tiles: int, tokens: int, token_tiles: int) -> int:
    """Shared memory that a block's activations take."""
    return 2 * TILE * tiles * min(tokens, 8 * token_tiles)


@functools.cache
def _kernel(device: torch.device, name: str, *defines: tuple[str, int]) -> nvrtc.Kernel:
    return nvrtc.Kernel(_SOURCE, name, dict(defines), device)


def compute(
    x: Tensor, fragments: Tensor, scales: Tensor | None, bias: Tensor | None, out: Tensor, config: Config
) -> Tensor:
    """``x W^T + bias`` into ``out`` (tokens, out), which is also returned."""
    (tokens, columns), rows = x.shape, out.shape[1]
    defines = {
        **_number(fragments, scales, x.dtype, columns),
        "ROW_TILES": config.row_tiles,
        "TOKEN_TILES": config.token_tiles,
        "WARPS": config.warps,
        "AHEAD": config.ahead,
        "STAGED": config.staged,
        "RAGGED": int(columns % TILE != 0),
        "BIAS": int(bias is not None),
    }
    kernel, tiles = _kernel(x.device, "sparse_mma", *defines.items()), fragments.shape[1]
    shared = staged_bytes(tiles, tokens, config.token_tiles) if config.staged else 0
    at_once = kernel.at_once(32 * config.warps, shared) * _processors(x.device)
    grid = (min(-(-len(fragments) // config.row_tiles), at_once), -(-tokens // (8 * config.token_tiles)))
    kernel.launch(
        grid, (32, config.warps), shared, fragments, x, scales, bias, out,
        tokens, rows, columns, tiles, 0 if scales is None else len(scales),
    )  # fmt: skip
    return out


def expand(fragments: Tensor, scales: Tensor | None, dtype: torch.dtype, columns: int) -> Tensor:
    """The (out, in) weight in ``dtype``, a quantised one rounded to it."""
    out = torch.empty(ROWS * len(fragments), columns, dtype=dtype, device=fragments.device)
    number = _number(fragments, scales, dtype, columns)
    _kernel(out.device, "expand", *number.items(), ("EXPAND", 1)).launch(
        (len(fragments), fragments.shape[1]), (32, 8), 0, fragments, scales, out,
        len(out), columns, fragments.shape[1], 0 if scales is None else len(scales),
    )  # fmt: skip
    return out


def _number(fragments: Tensor, scales: Tensor | None, dtype: torch.dtype, columns: int) -> dict[str, int]:
    bits = bits_of(fragments)
    return {
        "BITS": bits,
        "FLOAT8": int(bits == 8 and scales is None),
        "HALF": int(dtype == torch.float16),
        "GROUP": -1 if scales is None else group_size(len(scales), columns),
    }


def _unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"runs on CUDA devices; the weight is on {device.type}"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or more, not {torch.cuda.get_device_name(device)}"
    return nvrtc.unavailable()


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _choices(device: torch.device) -> Choices:
    return Choices("sparse-mma", {"gpu": torch.cuda.get_device_name(device)}, always=False)


def _run(x: Tensor, fragments: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    (tokens, columns), rows, tiles = x.shape, ROWS * len(fragments), fragments.shape[1]
    if tokens > _MANY:  # a dense product, of a weight that is there for that long
        with torch.cuda.device(x.device):
            return functional.linear(x, expand(fragments, scales, x.dtype, columns), bias)
    out = x.new_empty(tokens, rows)
    if not tokens or not rows:
        return out
    if x.data_ptr() % 16:  # a lane reads 16 bytes at a time
        x = x.clone()
    about = bucket(tokens, 1)  # what is chosen is for all numbers of tokens up to this
    shared = getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 48 << 10)
    default = default_config(rows, tiles, about, _processors(x.device), shared)
    kind = f"{bits_of(fragments)} bits, {x.dtype}, {0 if scales is None else len(scales)} scales"
    with torch.cuda.device(x.device):

        def search() -> Config:
            tried = candidates(default, tiles, about, shared)
            return tried[fastest([functools.partial(compute, x, fragments, scales, bias, out, c) for c in tried])]

        case = f"{rows}x{columns} {kind}, {about} tokens"
        return compute(x, fragments, scales, bias, out, Config(*_choices(x.device).get(case, search, default)))


def _like(x: Tensor, fragments: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], ROWS * fragments.shape[0])


torch.library.impl(_LIBRARY, "sparse_mma", "CompositeExplicitAutograd")(_run)
torch.library.register_fake("compressllm::sparse_mma", _like, lib=_LIBRARY)
