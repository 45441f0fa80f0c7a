"""Where a 2:4 weight's kept values and their positions lie, so that a sparse tensor core takes them as they come.

A weight is cut into blocks of 16 rows and tiles of 256 columns, filled up with zeros. A tile has 8 steps of 32 columns,
one product ``mma.sp.m16n8k32`` each. Lane ``4 * g + q`` of a warp holds, of a step, the two kept values of four groups
of 4 columns: of rows g and g + 8 in turn, groups q and q + 4 as the product counts them. It counts the first 4 of the
step's 8 groups as 0, 2, 4, 6 and the others as 1, 3, 5, 7: a lane then needs activations that lie side by side.

Of each tile there are first a lane's values, then the positions, 16 bytes a lane at a time:

- 16 bits: a step's four pairs of values, in each 16 bytes.
- 8 bits: two steps; a word holds two pairs, their first values in bytes 0 and 1, their second ones in 2 and 3.
- 4 bits: four steps, a word each, with 8 added: four first values in the lower half, four second ones in the upper.
- positions: a word for each two steps, held for the first by lanes with q of 0 and 1, for the second by the others;
  each of the two holds four groups of rows g (lower half) and g + 8: 2 bits a value, lowest position first.

So a 16-bit weight takes 9 bits, an 8-bit one 5, a 4-bit one 3.

Source: PTX ISA, matrix fragments of sparse mma.m16n8k32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressllm.kernels.gpu.layout import two_of_four

ROWS, TILE = 16, 256
_COUNTED = [0, 4, 1, 5, 2, 6, 3, 7]  # group of a step, in the order the product counts them


def pack_fragments(weight: Tensor, keep: Tensor, bits: int) -> Tensor:
    """(row blocks, tiles, bits / 2 + 1, 32, 4) int32.

    Args:
        weight: (out, in) of 16 bits an element, or of 8; with ``bits`` 4 integers of -8 to 7 in int8.
        keep: (out, in) bool, at most 2 of every 4. What else is not 0 is dropped.
    """
    chosen = two_of_four(keep)
    rows, columns = keep.shape
    number = weight.view(torch.int16 if bits == 16 else torch.int8).masked_fill(~keep, 0)
    kept = number.masked_select(chosen).view(rows, columns // 4, 2)
    where = torch.arange(4, device=keep.device).expand(rows, columns // 4, 4).masked_select(chosen.view(rows, -1, 4))
    pairs = where.view(rows, columns // 4, 2).to(torch.uint8)
    empty = _filled_up(torch.ones_like(pairs[..., 0]), 0) == 0
    nibbles = _filled_up(pairs[..., 0] | pairs[..., 1] << 2, 0).masked_fill_(empty, 0b0100)
    values = _values(_blocks(_filled_up(kept, 0)), bits)
    positions = _positions(_blocks(nibbles.unsqueeze(-1)).squeeze(-1))
    return torch.cat((values, positions), dim=2)


def unpack_fragments(packed: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """(out, in) int16 or int8: the bits that were packed, 0 where nothing is kept."""
    loads = bits // 2
    values, positions = packed[:, :, :loads], packed[:, :, loads:]
    blocks, tiles = packed.shape[:2]
    # block, tile, step, g, q, half, hi, pair -> block, hi, g, tile, step, counted group (half, q), pair
    if bits == 16:
        each = values.contiguous().view(torch.int16).view(blocks, tiles, 8, 8, 4, 2, 2, 2)
    elif bits == 8:
        each = values.contiguous().view(torch.int8).view(blocks, tiles, 4, 8, 4, 2, 2, 2, 2)  # …, step, half, pair, hi
        each = each.permute(0, 1, 2, 5, 3, 4, 6, 8, 7).reshape(blocks, tiles, 8, 8, 4, 2, 2, 2)
    else:
        byte = (
            values.contiguous().view(torch.uint8).view(blocks, tiles, 2, 8, 4, 4, 2, 2)
        )  # …, step, pair, half: hi 0, 1
        each = (torch.stack((byte & 15, byte >> 4), -1).to(torch.int8) - 8).permute(0, 1, 2, 5, 3, 4, 7, 8, 6)
        each = each.reshape(blocks, tiles, 8, 8, 4, 2, 2, 2)
    kept = _rows(each.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(blocks, 2, 8, tiles, 8, 8, 2))
    byte = (
        positions.contiguous().view(torch.uint8).view(blocks, tiles, 8, 2, 2, 4, 2, 2)
    )  # g, second, part, p, hi, byte
    nibble = torch.stack((byte & 15, byte >> 4), -1).permute(0, 6, 2, 1, 5, 3, 4, 7, 8)  # block hi g tile p second part
    pairs = _rows(nibble.reshape(blocks, 2, 8, tiles, 8, 8, 1)).squeeze(-1)
    where = torch.stack((pairs & 3, pairs >> 2), -1).long()
    full = torch.zeros(*pairs.shape, 4, dtype=kept.dtype, device=kept.device).scatter_(-1, where, kept)
    return full.flatten(1)[:rows, :columns].contiguous()


def _filled_up(groups: Tensor, value: int) -> Tensor:
    """(out, groups, …) -> the same with whole blocks of rows and whole tiles of groups."""
    rows, count = groups.shape[:2]
    full = groups.new_full((-(-rows // ROWS) * ROWS, -(-count // (TILE // 4)) * (TILE // 4), *groups.shape[2:]), value)
    full[:rows, :count] = groups
    return full


def _blocks(groups: Tensor) -> Tensor:
    """(out, groups, n) -> (block, hi, g, tile, step, counted group, n)."""
    rows, count, size = groups.shape
    return groups.view(rows // ROWS, 2, 8, count // 64, 8, 8, size)[:, :, :, :, :, _COUNTED]


def _rows(blocks: Tensor) -> Tensor:
    """The inverse of `_blocks`."""
    inverse = torch.tensor(_COUNTED, device=blocks.device).argsort()
    made = blocks[:, :, :, :, :, inverse]
    return made.reshape(made.shape[0] * ROWS, -1, made.shape[-1])


def _values(blocks: Tensor, bits: int) -> Tensor:
    """(block, tile, bits / 2, 32, 4) int32 of (block, hi, g, tile, step, counted group, pair)."""
    count, tiles = blocks.shape[0], blocks.shape[3]
    halves = blocks.view(*blocks.shape[:5], 2, 4, 2)
    lanes = halves.permute(0, 3, 4, 2, 6, 5, 1, 7)  # block, tile, step, g, q, half, hi, pair
    if bits == 8:  # steps go in twos; then half, pair, hi
        lanes = lanes.reshape(count, tiles, 4, 2, *lanes.shape[3:]).permute(0, 1, 2, 4, 5, 3, 6, 8, 7)
    if bits == 4:  # steps go in fours; then pair, half, hi, of which two make a byte
        lanes = lanes.reshape(count, tiles, 2, 4, *lanes.shape[3:]).permute(0, 1, 2, 4, 5, 3, 8, 6, 7)
        code = (lanes + 8).to(torch.uint8)
        lanes = code[..., 0] | code[..., 1] << 4
    return lanes.reshape(count, tiles, bits // 2, 32, -1).contiguous().view(torch.int32)


def _positions(nibbles: Tensor) -> Tensor:
    """(block, tile, 1, 32, 4) int32 of (block, hi, g, tile, step, counted group) uint8 of 4 bits."""
    count, tiles = nibbles.shape[0], nibbles.shape[3]
    each = nibbles.view(*nibbles.shape[:4], 4, 2, 2, 4)  # block, hi, g, tile, p, second, part, group
    lanes = each.permute(0, 3, 2, 5, 6, 4, 1, 7)  # block, tile, g, second, part, p, hi, group
    byte = lanes[..., ::2] | lanes[..., 1::2] << 4
    return byte.reshape(count, tiles, 1, 32, -1).contiguous().view(torch.int32)
