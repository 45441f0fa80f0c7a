"""The bf16 2:4 format of the C kernels: packing, unpacking, the operator."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from compressllm.core.errors import PatternError
from compressllm.kernels.native import pages
from compressllm.kernels.native.library import SAMPLES, Library, library
from compressllm.kernels.native.torchop import define_linear

_ROWS, _COLUMNS = 16, 32  # of a block
_WORDS = _ROWS * 9  # uint32 of a block: codes, and 8 groups of pairs

MANY_TOKENS = 4  # from here on a matrix unit, mostly idle, is faster than vectors; measured on AMX

linear = define_linear("bf16", "bf16wide", MANY_TOKENS)


def pack(weight: Tensor, keep: Tensor) -> Tensor:
    """(out, in) bfloat16 and bool -> (ceil(out / 16), ceil(in / 32), 144) int32 blocks; in is a multiple of 4.

    Raises: PatternError if a group of four keeps more than two.
    """
    return _pack(library(), weight, keep)


def _pack(loaded: Library, weight: Tensor, keep: Tensor) -> Tensor:
    rows, columns = weight.shape
    blocks = pages.zeros((-(-rows // _ROWS), -(-columns // _COLUMNS), _WORDS), torch.int32)
    weight, keep = weight.contiguous(), keep.contiguous()
    call = loaded.c.bf16_pack
    call.restype = ctypes.c_int64
    wrong = call(*_addresses(blocks, weight, keep), ctypes.c_int64(rows), ctypes.c_int64(columns))
    if wrong:
        raise PatternError(f"{wrong} groups of 4 keep more than 2 weights, which is not 2:4; check the mask")
    return blocks


def unpack(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """The (rows, columns) bfloat16 weight that `pack` was given, bit for bit."""
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    blocks = blocks.contiguous()
    library().c.bf16_unpack(*_addresses(weight, blocks), ctypes.c_int64(rows), ctypes.c_int64(columns))
    return weight


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sample(loaded: Library) -> tuple[Tensor, int, int]:
    """21 x 100: both padded; all six pairs, groups of one kept value and of none."""
    rows, columns = 21, 100
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=random).bfloat16()
    order = torch.rand(rows, columns // 4, 4, generator=random).argsort(-1)
    kept = torch.randint(0, 5, (rows, columns // 4, 1), generator=random).clamp(max=2)
    keep = (order < kept).view(rows, columns)
    return _pack(loaded, weight, keep), rows, columns


SAMPLES["bf16"] = SAMPLES["bf16wide"] = _sample
