"""The quantised 2:4 formats of the C kernels, int8 and int4: packing, unpacking, the operators."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressllm.core.errors import FormatError, PatternError
from compressllm.core.quantized import QuantizedWeight, dequantize, quantize_absmax
from compressllm.kernels.native import pages
from compressllm.kernels.native.library import SAMPLES, Library, library, unavailable
from compressllm.kernels.native.torchop import Operator, define_linear

_ROWS, _SPAN = 16, 32  # of a block; columns that share their positions


@dataclass(frozen=True)
class Layout:
    """How blocks are laid out, see c/integer.h. Their size tells one layout from another.

    Args:
        bits: Of a code, 8 or 4.
        group: Columns with a scale, 32, 64 or 128: those of a block.
    """

    bits: int
    group: int

    @property
    def name(self) -> str:
        """The format's, in the C sources; with ``_exact`` behind, that of its kernels for float32 inputs."""
        return f"int{self.bits}_g{self.group}"

    @property
    def wide(self) -> str:
        """The format for many tokens, of the same blocks."""
        return f"{self.name}wide"

    @property
    def block_bytes(self) -> int:
        """Of 16 rows and ``group`` columns: float16 scales, two bits of position and the code of each kept weight."""
        return 2 * _ROWS + self.group // _SPAN * _ROWS * (4 + _SPAN // 2 * self.bits // 8)


_LAYOUTS = {
    layout.block_bytes: layout for bits in (8, 4) for group in (32, 64, 128) for layout in [Layout(bits, group)]
}
#: Tokens from which a matrix unit is faster than vectors that round the inputs, or do not; measured on AMX.
MANY_ROUNDED, MANY_EXACT = 9, 6

_ROUNDED = {size: define_linear(one.name, one.wide, MANY_ROUNDED) for size, one in _LAYOUTS.items()}
_EXACT = {size: define_linear(f"{one.name}_exact", one.wide, MANY_EXACT) for size, one in _LAYOUTS.items()}


@functools.cache
def rounds_up_to() -> float:
    """Tokens whose inputs, in bfloat16, are rounded at most, where they are not to be exact."""
    wide = next(iter(_LAYOUTS.values())).wide
    return math.inf if unavailable() or library().kernel(wide).isa == "scalar" else MANY_ROUNDED - 1


def refuses(weight: QuantizedWeight) -> str | None:
    """Why the layouts cannot hold a weight's scales or codes, or None."""
    if not torch.equal(weight.scales.half().float(), weight.scales):  # a NaN neither
        return "its scales must be float16 numbers, which these are not; round them before quantising, as absmax does"
    if weight.bits == 4 and weight.codes.numel() and (weight.codes.amin() < -8 or weight.codes.amax() > 7):
        return f"codes of 4 bits are -8 to 7, not {int(weight.codes.amin())} to {int(weight.codes.amax())}"
    return None


def pack(weight: QuantizedWeight, keep: Tensor) -> Tensor:
    """Quantised (out, in) and bool -> (ceil(out / 16), groups, bytes) uint8 blocks; in is a multiple of 4.

    Raises: PatternError if a group of four keeps more than two; FormatError if the layouts cannot hold the weight.
    """
    if reason := refuses(weight):
        raise FormatError(f"weight of {tuple(weight.shape)}: {reason}")
    return _pack(library(), weight, keep, layout_of(weight.shape[1], weight.bits, weight.group))


def layout_of(columns: int, bits: int, group: int) -> Layout:
    """The smallest layout whose groups each lie within one of ``group`` columns; the larger groups if two are equal.

    Larger ones are padded more, and one scale a row is repeated for each block.
    """
    fit = [
        layout for layout in _LAYOUTS.values() if layout.bits == bits and (group >= columns or not group % layout.group)
    ]
    return min(fit, key=lambda layout: (-(-columns // layout.group) * layout.block_bytes, -layout.group))


def _pack(loaded: Library, weight: QuantizedWeight, keep: Tensor, layout: Layout) -> Tensor:
    rows, columns = weight.shape
    groups = -(-columns // layout.group)
    source = torch.arange(groups) * layout.group // weight.group  # scales are repeated where groups are split
    scales = weight.scales[:, source].half().contiguous()
    codes, keep = weight.codes.contiguous(), keep.contiguous()
    blocks = pages.zeros((-(-rows // _ROWS), groups, layout.block_bytes), torch.uint8)
    call = loaded.c.integer_pack
    call.restype = ctypes.c_int64
    if wrong := call(*_addresses(blocks, codes, keep, scales), *_shape(rows, columns, layout)):
        raise PatternError(f"{wrong} groups of 4 keep more than 2 weights, which is not 2:4; check the mask")
    return blocks


def unpack(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """The (rows, columns) float32 weight that `pack` was given: codes times scales, exactly."""
    layout, blocks = _LAYOUTS[blocks.shape[-1]], blocks.contiguous()
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, blocks.shape[1], dtype=torch.float16)
    library().c.integer_unpack(*_addresses(codes, scales, blocks), *_shape(rows, columns, layout))
    return dequantize(codes, scales.float(), layout.group)


def linear(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int, exact: bool) -> Tensor:
    """(..., in) -> (..., rows).

    Args:
        exact: Multiply the inputs as they are. Otherwise each token's are first rounded to int8, 32 columns at a time,
            to multiples of a 127th of the largest; an input that is not finite then makes all outputs of its token NaN.

    On AMX, `MANY_ROUNDED` or `MANY_EXACT` and more tokens in bfloat16 are multiplied as they are in either case, by
    weights that are rounded to bfloat16.
    """
    operators: dict[int, Operator] = _EXACT if exact else _ROUNDED
    return operators[blocks.shape[-1]](x, blocks, bias, rows)


def format_of(blocks: Tensor, exact: bool) -> str:
    """Name of the format that `linear` takes these blocks for."""
    return _LAYOUTS[blocks.shape[-1]].name + ("_exact" if exact else "")


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _shape(rows: int, columns: int, layout: Layout) -> list[ctypes.c_int64 | ctypes.c_int]:
    return [ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_int(layout.bits), ctypes.c_int64(layout.group)]


def _sample(layout: Layout, loaded: Library) -> tuple[Tensor, int, int]:
    """21 x 300: both padded; all six pairs, groups of four with one kept value and with none, the extreme codes."""
    rows, columns = 21, 300
    random = torch.Generator().manual_seed(0)
    order = torch.rand(rows, columns // 4, 4, generator=random).argsort(-1)
    kept = torch.randint(0, 5, (rows, columns // 4, 1), generator=random).clamp(max=2)
    keep = (order < kept).view(rows, columns)
    made = quantize_absmax(torch.randn(rows, columns, generator=random), keep, layout.bits, layout.group)
    lowest = -(2 ** (layout.bits - 1))
    codes = torch.where(keep & (torch.rand(keep.shape, generator=random) < 0.1), lowest, made.codes).to(torch.int8)
    return _pack(loaded, QuantizedWeight(codes, made.scales, layout.bits, layout.group), keep, layout), rows, columns


for _layout in _LAYOUTS.values():
    for _name in (_layout.name, f"{_layout.name}_exact", _layout.wide):
        SAMPLES[_name] = functools.partial(_sample, _layout)
