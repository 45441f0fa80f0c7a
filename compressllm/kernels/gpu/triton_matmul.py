"""Triton: few tokens times a 2:4 weight in the layout of `layout.py`, of which only the kept bytes are read.

A program decodes its share of the weight in registers and multiplies it on the tensor cores, weights to the left:
on Hopper the left operand may come from registers, so that decoded weights never go through shared memory. For the
same reason a group's four columns go into two products of 32 columns each, positions 0 and 1 in one and 2 and 3 in
the other: each thread then decodes just what it multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources as OutOfResources

from compressllm.kernels.gpu.configs import Config


def matmul(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    config: Config,
) -> Tensor:
    """``x W^T + bias``.

    On a CPU this is for triton's interpreter, which has no arithmetic for bfloat16 and truncates to it: everything is
    float32 there, until the result is rounded.

    Args:
        x: (tokens, in) bfloat16 or float16, contiguous.
        values, meta: The weight, as `layout.py` has it, of ``bits`` a value; float8 if it has 8 and no scales.
        scales: (groups, out) float32, or None.
        bias: (out,) or None.
        group: Columns that share a scale; 0 if one is the whole row's, -1 without scales.

    Returns: (tokens, out) in the dtype of ``x``.
    """
    (tokens, columns), rows, tiles = x.shape, meta.shape[0], meta.shape[1] // 16
    interpreted = x.device.type == "cpu"
    out = torch.empty(tokens, rows, dtype=torch.float32 if interpreted else x.dtype, device=x.device)
    split = config.splits > 1
    parts = torch.empty(config.splits, tokens, rows, dtype=torch.float32, device=x.device) if split else out
    block_tokens = 16 if tokens <= 16 or group == 32 else 32  # two scales a product take many registers
    grid = (triton.cdiv(rows, config.block_rows), triton.cdiv(tokens, block_tokens), config.splits)
    carrier = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    matmul_kernel[grid](
        x, values.view(torch.uint32), meta.view(torch.uint32), x if scales is None else scales,
        x if bias is None else bias, parts, tokens, rows, columns, tiles, len(scales) if scales is not None else 0,
        tiles_a_split=tiles // config.splits, bits=bits, float8=bits == 8 and scales is None, carrier=carrier,
        compute=tl.float32 if interpreted else carrier, group=group, has_bias=bias is not None and not split,
        ragged=columns % 512 != 0, block_rows=config.block_rows, block_tokens=block_tokens,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split:
        add_splits_kernel[(triton.cdiv(out.numel(), 1024),)](
            parts, x if bias is None else bias, out, out.numel(), rows,
            splits=config.splits, has_bias=bias is not None, block=1024,
        )  # fmt: skip
    return out.to(x.dtype)


@triton.jit
def pick(mask: tl.tensor, yes: tl.tensor, no: tl.tensor) -> tl.tensor:
    """Bits of ``yes`` where the mask has ones, else of ``no``."""
    return (yes & mask) | (no & (mask ^ 0xFFFFFFFF))


@triton.jit
def expand(
    v0: tl.tensor, v1: tl.tensor, meta: tl.tensor, plane: tl.constexpr, bits: tl.constexpr, zero: tl.constexpr
) -> tl.tensor:
    """Four words, one for each position in a group, of the two words of kept values of as many groups as have lanes.

    The first kept value can be at positions 0 to 2, the second at 1 to 3, and which of them is at position 1 or 2
    follows from whether 0 or 3 is taken. Positions that are not kept become ``zero``.
    """
    lowest: tl.constexpr = 0xFFFFFFFF // ((1 << bits) - 1)  # bit of every lane
    m0 = ((meta >> (4 * plane)) & lowest) * ((1 << bits) - 1)
    m1 = ((meta >> (4 * plane + 1)) & lowest) * ((1 << bits) - 1)
    m2 = ((meta >> (4 * plane + 2)) & lowest) * ((1 << bits) - 1)
    m3 = ((meta >> (4 * plane + 3)) & lowest) * ((1 << bits) - 1)
    e0 = pick(m0, v0, zero)
    e1 = pick(m1, pick(m0, v1, v0), zero)
    e2 = pick(m2, pick(m3, v0, v1), zero)
    e3 = pick(m3, v1, zero)
    return e0, e1, e2, e3


@triton.jit
def numbers(
    both: tl.tensor,
    lane: tl.constexpr,
    bits: tl.constexpr,
    float8: tl.constexpr,
    carrier: tl.constexpr,
    compute: tl.constexpr,
) -> tl.tensor:
    """(rows, 16) words -> (rows, 32) numbers: lane ``lane`` of each word's low half, then that of its high half.

    Conversions are slow, so bits are put where a 16-bit float of dtype ``carrier`` has them, two at a time, and one
    exact operation on floats does the rest. An 8-bit integer has too many bits for bfloat16 and goes through float32.
    """
    brain: tl.constexpr = carrier == tl.bfloat16
    if bits == 4:  # into the lowest bits of 128 or 1024
        both = ((both >> (4 * lane)) & 0x000F000F) | (0x43004300 if brain else 0x64006400)
    elif float8:  # sign to sign; exponent and mantissa to their places, which makes it too small by a power of 2
        both = both << (8 - 8 * lane)
        magnitude = (both >> 4) & 0x07F007F0 if brain else (both >> 1) & 0x3F803F80
        both = (both & 0x80008000) | magnitude
    if bits == 8 and not float8:  # into the mantissa of 2^23
        low = (((both >> (8 * lane)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
        high = (((both >> (8 * lane + 16)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
        low = (low - 8388736.0).to(compute)  # 2^23 and the offset
        high = (high - 8388736.0).to(compute)
        return tl.reshape(tl.join(low, high), (both.shape[0], 2 * both.shape[1]))
    if brain and compute == tl.float32:  # triton's interpreter, which widens no subnormal bfloat16
        low = (both << 16).to(tl.float32, bitcast=True)
        high = (both & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (both & 0xFFFF).to(tl.uint16).to(carrier, bitcast=True).to(compute)
        high = (both >> 16).to(tl.uint16).to(carrier, bitcast=True).to(compute)
    pairs = tl.reshape(tl.join(low, high), (both.shape[0], 2 * both.shape[1]))
    if bits == 4:
        return pairs - (136.0 if brain else 1032.0)
    elif float8:
        return pairs * (1.329227995784916e36 if brain else 256.0)  # 2^120
    return pairs


@triton.jit(do_not_specialize=["tokens"])
def matmul_kernel(
    x_ptr: tl.tensor,  # (tokens, columns)
    values_ptr: tl.tensor,  # (rows, tiles, planes, 2, 16) uint32
    meta_ptr: tl.tensor,  # (rows, tiles, 16) uint32
    scales_ptr: tl.tensor,  # (groups, rows) float32
    bias_ptr: tl.tensor,  # (rows,)
    out_ptr: tl.tensor,  # (splits, tokens, rows)
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    tiles_a_split: tl.constexpr,
    bits: tl.constexpr,
    float8: tl.constexpr,
    carrier: tl.constexpr,
    compute: tl.constexpr,
    group: tl.constexpr,  # columns that share a scale; 0: the whole row, -1: there are none
    has_bias: tl.constexpr,
    ragged: tl.constexpr,  # the last tile has more columns than there are
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """One block of rows and of tokens, over one split of the tiles."""
    planes: tl.constexpr = bits // 4
    lanes: tl.constexpr = 32 // bits
    zero: tl.constexpr = 0 if bits == 16 or float8 else (0x80808080 if bits == 8 else 0x88888888)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    split = tl.program_id(2)
    at = tl.minimum(row, rows - 1).to(tl.int64)  # rows past the last are computed and not stored
    here = token[None, :] < tokens
    word = tl.arange(0, 16)
    k = tl.arange(0, 32)
    spread = 4 * (k // 2) + k % 2  # the columns of one product: two neighbours of every group
    x_row = x_ptr + token[None, :].to(tl.int64) * columns + spread[:, None]
    total = tl.full((block_rows, block_tokens), 0.0, tl.float32)
    for index in range(tiles_a_split):
        tile = split * tiles_a_split + index
        meta = tl.load(meta_ptr + (at[:, None] * tiles + tile) * 16 + word[None, :])
        for plane in tl.static_range(planes):
            values = values_ptr + (((at[:, None] * tiles + tile) * planes + plane) * 32 + word[None, :])
            e0, e1, e2, e3 = expand(tl.load(values), tl.load(values + 16), meta, plane, bits, zero)
            for half in tl.static_range(2):
                if half == 0:
                    e01 = (e0 & 0xFFFF) | (e1 << 16)
                    e23 = (e2 & 0xFFFF) | (e3 << 16)
                else:
                    e01 = (e0 >> 16) | (e1 & 0xFFFF0000)
                    e23 = (e2 >> 16) | (e3 & 0xFFFF0000)
                for lane in tl.static_range(lanes // 2):
                    first = 512 * tile + 64 * (plane * lanes + half * (lanes // 2) + lane)
                    w01 = numbers(e01, lane, bits, float8, carrier, compute)
                    w23 = numbers(e23, lane, bits, float8, carrier, compute)
                    if ragged:
                        x01 = tl.load(x_row + first, mask=here & (first + spread < columns)[:, None], other=0.0)
                        x23 = tl.load(x_row + first + 2, mask=here & (first + 2 + spread < columns)[:, None], other=0.0)
                    else:
                        x01 = tl.load(x_row + first, mask=here, other=0.0)
                        x23 = tl.load(x_row + first + 2, mask=here, other=0.0)
                    x01 = x01.to(compute)
                    x23 = x23.to(compute)
                    if group <= 0:
                        total = tl.dot(w23, x23, tl.dot(w01, x01, total))
                    elif group >= 64:
                        part = tl.dot(w23, x23, tl.dot(w01, x01))
                        scale = tl.load(scales_ptr + tl.minimum(first // group, groups - 1) * rows + at)
                        total += part * scale[:, None]
                    else:  # the 64 columns have two scales
                        for piece in tl.static_range(2):
                            mine = (k // 16 == piece)[:, None]
                            part = tl.dot(w01, tl.where(mine, x01, 0.0).to(compute))
                            part = tl.dot(w23, tl.where(mine, x23, 0.0).to(compute), part)
                            scale = tl.load(scales_ptr + tl.minimum(first // 32 + piece, groups - 1) * rows + at)
                            total += part * scale[:, None]
    if group == 0:
        total *= tl.load(scales_ptr + at)[:, None]
    if has_bias:
        total += tl.load(bias_ptr + at)[:, None].to(tl.float32)
    to = out_ptr + (split * tokens + token[None, :]).to(tl.int64) * rows + row[:, None]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=here & (row[:, None] < rows))


@triton.jit
def add_splits_kernel(
    parts_ptr: tl.tensor,  # (splits, tokens * rows) float32
    bias_ptr: tl.tensor,  # (rows,)
    out_ptr: tl.tensor,  # (tokens * rows,)
    size: tl.tensor,
    rows: tl.tensor,
    splits: tl.constexpr,
    has_bias: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Add up what the splits found, in order."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    total = tl.full((block,), 0.0, tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + split * size + at, mask=inside, other=0.0)
    if has_bias:
        total += tl.load(bias_ptr + at % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
