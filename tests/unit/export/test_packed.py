import pytest
import torch

from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.export.packed import Packed

SHAPE = (2, 12)


def packed(weight: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(Packed().pack("l", weight, keep))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    keep = torch.zeros(SHAPE, dtype=torch.bool)
    keep[0, [1, 5, 11]] = True
    keep[1, [0, 2, 8]] = True
    return packed(torch.arange(24.0).view(SHAPE) + 1, keep)


def test_the_byte_of_the_sheet():
    row = torch.tensor([[0.0, 1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 4.0]])
    tensors = packed(row, row != 0)
    assert tensors["l.bitmask"].tolist() == [[0x96]]
    assert tensors["l.values"].tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_layout_by_a_slow_obvious_version(tensors):
    assert tensors["l.values"].tolist() == [[2.0, 6.0, 12.0], [13.0, 15.0, 21.0]]
    assert tensors["l.bitmask"].tolist() == [[0b00100010, 0b1000], [0b00000101, 0b1]]
    assert tensors["l.weight"].shape == (0,)  # what makes other loaders stumble


def test_uneven_rows_are_stored_flat():
    keep = torch.tensor([[True, False, True], [False, True, False]])
    tensors = packed(torch.arange(6.0).view(2, 3), keep)
    assert tensors["l.values"].tolist() == [0.0, 2.0, 4.0]


def test_nothing_kept():
    tensors = packed(torch.ones(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    assert tensors["l.values"].shape == (3, 0)
    assert not Packed().unpack("l", tensors.__getitem__, (3, 5)).any()


def test_kept_zeros_keep_their_sign_and_pruned_ones_lose_it():
    weight = torch.tensor([[-0.0, -0.0, 1.0, float("nan")]])
    keep = torch.tensor([[True, False, False, True]])
    back = Packed().unpack("l", packed(weight, keep).__getitem__, (1, 4))
    assert raw(back).tolist() == raw(torch.tensor([[-0.0, 0.0, 0.0, float("nan")]])).tolist()


def test_shards_decode_to_slices_of_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    keep = torch.rand(6, 8, 4).argsort(-1).lt(2).view(6, 32)
    tensors, dense = packed(weight, keep), weight.masked_fill(~keep, 0)
    rows = {"l.values": tensors["l.values"][2:5], "l.bitmask": tensors["l.bitmask"][2:5]}
    assert torch.equal(Packed().unpack("l", rows.__getitem__, (3, 32)), dense[2:5])
    # a column shard at a multiple of 8: one byte of the mask, half as many values
    columns = {"l.values": tensors["l.values"][:, 4:12], "l.bitmask": tensors["l.bitmask"][:, 1:3]}
    assert torch.equal(Packed().unpack("l", columns.__getitem__, (6, 16)), dense[:, 8:24])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("values", lambda t: t[:, :2], "has 4 values, its bitmask keeps 6"),
        ("values", lambda t: t.view(-1), r"values have shape \(6,\), its bitmask implies \(2, 3\)"),
        ("values", lambda t: t.view(3, 2), "values have shape"),
        ("bitmask", lambda t: t | 0b1000, "has 6 values, its bitmask keeps 9"),
        ("bitmask", lambda t: t[:, :1], r"a weight of 2 x 12 needs uint8 \(2, 2\)"),
        ("bitmask", lambda t: t.to(torch.int8), "bitmask is torch.int8"),
        ("bitmask", lambda t: t | 0x80, "keeps columns past the last, 12"),
    ],
)
def test_damage_is_one_line(tensors, part, change, message):
    tensors[f"l.{part}"] = change(tensors[f"l.{part}"])
    with pytest.raises(FormatError, match=message) as caught:
        Packed().unpack("l", tensors.__getitem__, SHAPE)
    assert "\n" not in str(caught.value)
