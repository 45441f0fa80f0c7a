"""The unstructured bf16 format of the C kernels: packing, unpacking, the operator."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.kernels.native import pages
from compressllm.kernels.native.library import SAMPLES, Library, library
from compressllm.kernels.native.torchop import define_linear

_ROWS, _COLUMNS = 16, 256  # of a block
_OVERREAD = 64  # bytes that a kernel may read past the last value

linear = define_linear("bitmask")


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
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16)
    blocks = blocks.contiguous()
    library().c.bitmask_unpack(*_addresses(weight, blocks), ctypes.c_int64(rows), ctypes.c_int64(columns))
    return weight


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sample(loaded: Library) -> tuple[Tensor, int, int]:
    """21 x 600: both padded; rows from all kept to none."""
    rows, columns = 21, 600
    random = torch.Generator().manual_seed(0)
    keep = torch.rand(rows, columns, generator=random) < torch.linspace(1.0, 0.0, rows).unsqueeze(1)
    return _pack(loaded, torch.randn(rows, columns, generator=random).bfloat16(), keep), rows, columns


SAMPLES["bitmask"] = _sample
