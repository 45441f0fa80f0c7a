"""Where a 2:4 weight's kept values and mask lie, so that a kernel decodes all lanes of a 32-bit word at once.

A row is cut into tiles of 512 columns, 128 groups of 4; the last tile is filled up with pruned groups. Group
``16 * q + w`` of a tile belongs to word ``w`` of lane ``q``, of 16 words and 8 lanes. ``bits`` is the width of a value:

- ``meta``, one word for each w: bit ``bits * (q % lanes) + 4 * (q // lanes) + j`` says whether position j of lane q is
  kept, where ``lanes = 32 // bits`` is how many values fit into a word. Two positions of every group are, though
  their values may be 0; none of those that fill up the last tile.
- ``values``: for each of the ``8 // lanes`` planes 16 words of first values, then 16 of second ones. Lane
  ``q % lanes``, lowest bits first, of a word of plane ``q // lanes`` is the value of lane q.

So a 16-bit weight takes 9 bits, an 8-bit one 5, a 4-bit one 3. Integers are stored with an offset that makes them
positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressllm.core.masks import pack_bits, unpack_bits
from compressllm.core.pattern import NM, SparsityPattern

TILE = 512  # columns
WORDS = 16  # of a plane, in a tile
GROUPS = TILE // 4


def fits_2to4(pattern: SparsityPattern) -> bool:
    """Whether every mask that obeys the pattern keeps at most 2 of every 4 aligned inputs."""
    return isinstance(pattern, NM) and ((pattern.m % 4 == 0 and pattern.n <= 2) or pattern == NM(1, 2))


def two_of_four(keep: Tensor) -> Tensor:
    """(out, in) mask of at most 2 in 4 -> one of exactly 2, some of which are then zeros."""
    return NM(2, 4).keep(keep.half())


def pack_meta(keep: Tensor, bits: int) -> Tensor:
    """(out, in) bool -> ``meta`` (out, 16 * tiles) int32."""
    planes = bits // 4
    groups = _tiled(two_of_four(keep).view(keep.shape[0], -1, 4))
    lanes = groups.view(*groups.shape[:2], planes, 8 // planes, WORDS, 4)  # out, tile, plane, lane, w, j
    each = lanes.permute(0, 1, 4, 3, 2, 5).reshape(-1, 32)
    return pack_bits(each).view(torch.int32).view(keep.shape[0], -1)


def unpack_meta(meta: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_meta`, with exactly 2 of every 4 kept."""
    planes = bits // 4
    each = unpack_bits(meta.contiguous().view(torch.uint8).view(-1, 4), 32)
    lanes = each.view(meta.shape[0], -1, WORDS, 8 // planes, planes, 4).permute(0, 1, 4, 3, 2, 5)
    return lanes.reshape(meta.shape[0], -1)[:, :columns]


def pack_values(weight: Tensor, keep: Tensor, bits: int) -> Tensor:
    """``values`` of an (out, in) weight that is 0 wherever ``keep`` is False.

    Args:
        weight: Of 16 or 8 bits an element; integers with their offset added.
        bits: 16, 8 or 4; at 4 the weight has one code a byte.

    Returns: (out, 256 * tiles) of the weight's dtype; at 4 bits (out, 128 * tiles) uint8, the lower lane in the lower
        nibble.
    """
    planes, out = bits // 4, weight.shape[0]
    kept = _codes(weight).masked_select(two_of_four(keep)).view(out, -1, 2)
    groups = _tiled(kept)
    lanes = groups.view(out, -1, planes, 8 // planes, WORDS, 2).permute(0, 1, 2, 5, 4, 3)  # …, first or second, w, lane
    flat = lanes.reshape(out, -1)
    if bits == 4:
        return flat[:, ::2] | flat[:, 1::2] << 4
    return flat.contiguous().view(weight.dtype)


def unpack_values(values: Tensor, meta: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_values`: (out, in), 0 where nothing is kept."""
    planes, out = bits // 4, values.shape[0]
    flat = _codes(values)
    if bits == 4:
        flat = torch.stack((values & 15, values >> 4), -1).view(out, -1)
    lanes = flat.view(out, -1, planes, 2, WORDS, 8 // planes).permute(0, 1, 2, 5, 4, 3)
    chosen = unpack_meta(meta, bits, columns)
    kept = lanes.reshape(out, -1)[:, : columns // 2]
    empty = torch.zeros(out, columns, dtype=kept.dtype, device=kept.device)
    return empty.masked_scatter_(chosen, kept).view(values.dtype)


def _codes(weight: Tensor) -> Tensor:
    """The same memory seen as integers."""
    return weight.view(torch.uint8 if weight.dtype.itemsize == 1 else torch.int16)


def _tiled(groups: Tensor) -> Tensor:
    """(out, groups, n) -> (out, tiles, 128 * n), filled up with zeros: with groups of which nothing is kept."""
    out, count, size = groups.shape
    padded = torch.nn.functional.pad(groups, (0, 0, 0, -count % GROUPS))
    return padded.view(out, -1, GROUPS * size)
