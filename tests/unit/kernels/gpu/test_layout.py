"""The Triton kernel's layout against one written word by word, as its description has it."""

import pytest
import torch

from compressllm.core.pattern import NM, Unstructured
from compressllm.kernels.gpu.layout import (
    fits_2to4,
    pack_meta,
    pack_values,
    two_of_four,
    unpack_meta,
    unpack_values,
)


def weights(bits, columns, pattern):
    torch.manual_seed(0)
    keep = pattern.keep(torch.rand(3, columns))
    keep[1, :8] = False  # groups of which nothing is kept
    codes = torch.randint(1, 1 << min(bits, 15), (3, columns)).masked_fill(~keep, 0)
    return codes.to(torch.int16 if bits == 16 else torch.uint8), keep


def slowly(codes, keep, bits):
    """Values and mask as lists of 32-bit words, tile by tile."""
    lanes, rows = 32 // bits, []
    for row, kept in zip(codes.tolist(), two_of_four(keep).tolist(), strict=True):
        values, metas = [], []
        for tile in range(-(-len(row) // 512)):
            meta, planes = [0] * 16, [[[0] * 16, [0] * 16] for _ in range(bits // 4)]
            for q in range(8):
                for w in range(16):
                    start = 512 * tile + 4 * (16 * q + w)
                    places = [j for j in range(4) if start < len(row) and kept[start + j]]
                    for which, j in enumerate(places):
                        meta[w] |= 1 << (bits * (q % lanes) + 4 * (q // lanes) + j)
                        planes[q // lanes][which][w] |= row[start + j] << (bits * (q % lanes))
            values += [word for plane in planes for which in plane for word in which]
            metas += meta
        rows.append((values, metas))
    return [values for values, _ in rows], [metas for _, metas in rows]


@pytest.mark.parametrize("columns", [512, 1024, 576, 64])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_lies_as_described(bits, columns):
    codes, keep = weights(bits, columns, NM(2, 4))
    values, meta = pack_values(codes, keep, bits), pack_meta(keep, bits)
    assert values.nbytes + meta.nbytes == 3 * -(-columns // 512) * 512 * {16: 9, 8: 5, 4: 3}[bits] // 8
    expected = slowly(codes, keep, bits)
    for got, words in zip((values, meta), expected, strict=True):
        assert (got.view(torch.int32).long() & 0xFFFFFFFF).tolist() == words


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 8), NM(1, 2)], ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_gives_the_weight_back(bits, pattern):
    codes, keep = weights(bits, 584, pattern)
    values, meta = pack_values(codes, keep, bits), pack_meta(keep, bits)
    assert torch.equal(unpack_values(values, meta, bits, 584), codes)
    assert torch.equal(unpack_meta(meta, bits, 584), two_of_four(keep))


def test_what_fits():
    assert all(map(fits_2to4, [NM(2, 4), NM(1, 4), NM(1, 2), NM(2, 8), NM(1, 16)]))
    assert not any(map(fits_2to4, [NM(3, 4), NM(4, 8), NM(1, 3), NM(2, 6), Unstructured(0.5)]))


def test_two_of_four_keeps_what_was_kept():
    keep = NM(1, 4).keep(torch.rand(4, 32))
    two = two_of_four(keep)
    assert (two & keep).equal(keep)
    assert (two.view(4, -1, 4).sum(-1) == 2).all()
