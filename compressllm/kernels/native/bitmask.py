"""The unstructured bf16 format of the C kernels: packing, unpacking, the operator."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.kernels.native import pages
from compressllm.kernels.native.library import SAMPLES, Library, library
from compressllm.kernels.native.torchop import define_linear

_ROWS, _COLUMNS = 16, 256  # of a block
_OVERREAD = 64  # bytes that a kernel may read past the last value
_FEW_TOKENS = 64  # up to which reading less makes up for a product that is slower than torch's
_EXPANDED = 16  # row blocks at a time: 4 MiB of 4096 columns

MANY_TOKENS = 6  # from here on a matrix unit is faster than vectors; measured on AMX

_linear = define_linear("bitmask", "bitmaskwide", MANY_TOKENS)
_library: Any = torch.library.Library("compressllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("bitmask_expand(Tensor blocks, int first, int last, int columns) -> Tensor")


def linear(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """(..., in) -> (..., rows).

    For many tokens the weight is expanded in a cache and multiplied by a matrix unit; where there is none, or the
    inputs are not bfloat16, it is expanded some rows at a time, and torch multiplies.
    """
    columns = x.shape[-1]
    if x.numel() <= _FEW_TOKENS * columns or (x.dtype == torch.bfloat16 and _has_wide()):
        return _linear(x, blocks, bias, rows)
    wide = x.float()
    parts = []
    for first in range(0, -(-rows // _ROWS), _EXPANDED):
        part = torch.ops.compressllm.bitmask_expand(blocks, first, min(first + _EXPANDED, -(-rows // _ROWS)), columns)
        parts.append(functional.linear(wide, part))
    y = torch.cat(parts, -1)[..., :rows]
    return (y if bias is None else y + bias.float()).to(x.dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_wide() -> bool:
    return library().kernel("bitmaskwide").isa != "scalar"


def pack(weight: Tensor, keep: Tensor) -> Tensor:
    """(out, in) bfloat16 and bool -> (bytes,) uint8: where blocks start, then a bit a weight and what is kept."""
    return _pack(library(), weight, keep)


def _pack(loaded: Library, weight: Tensor, keep: Tensor) -> Tensor:
    rows, columns = weight.shape
    weight, keep = weight.contiguous(), keep.contiguous()
    per_row = functional.pad(keep, (0, -columns % _COLUMNS)).view(rows, -1, _COLUMNS).sum(-1)
    kept = functional.pad(per_row, (0, 0, 0, -rows % _ROWS)).view(-1, _ROWS, per_row.shape[1]).sum(1)
    sizes = _ROWS * _COLUMNS // 8 + weight.dtype.itemsize * kept.flatten()
    offsets = 8 * (len(sizes) + 1) + functional.pad(sizes.cumsum(0), (1, 0))
    blocks = pages.zeros((int(offsets[-1]) + _OVERREAD,), torch.uint8)
    blocks[: offsets.nbytes].view(torch.int64).copy_(offsets)
    loaded.c.bitmask_pack(*_addresses(blocks, weight, keep), ctypes.c_int64(rows), ctypes.c_int64(columns))
    return blocks


def unpack(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """The (rows, columns) bfloat16 weight that `pack` was given, bit for bit."""
    wide: Tensor = torch.ops.compressllm.bitmask_expand(blocks, 0, -(-rows // _ROWS), columns)[:rows]
    return (wide.view(torch.int32) >> 16).short().view(torch.bfloat16)  # a cast would not keep every NaN


def _expand(blocks: Tensor, first: int, last: int, columns: int) -> Tensor:
    loaded, column_blocks = library(), -(-columns // _COLUMNS)
    wide = torch.empty((last - first) * _ROWS, column_blocks * _COLUMNS)
    call = getattr(loaded.c, f"bitmask_expand_{loaded.kernel('bitmask').isa}")
    call(*_addresses(wide, blocks.contiguous()), *map(ctypes.c_int64, (first, last, column_blocks)))
    return wide[:, :columns]


def _fake_expand(blocks: Tensor, first: int, last: int, columns: int) -> Tensor:
    wide = blocks.new_empty((last - first) * _ROWS, -(-columns // _COLUMNS) * _COLUMNS, dtype=torch.float32)
    return wide[:, :columns]


_library.impl("bitmask_expand", _expand, "CPU")
torch.library.register_fake("compressllm::bitmask_expand", _fake_expand, lib=_library)


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sample(loaded: Library) -> tuple[Tensor, int, int]:
    """21 x 600: both padded; rows from all kept to none."""
    rows, columns = 21, 600
    random = torch.Generator().manual_seed(0)
    keep = torch.rand(rows, columns, generator=random) < torch.linspace(1.0, 0.0, rows).unsqueeze(1)
    return _pack(loaded, torch.randn(rows, columns, generator=random).bfloat16(), keep), rows, columns


SAMPLES["bitmask"] = SAMPLES["bitmaskwide"] = _sample
