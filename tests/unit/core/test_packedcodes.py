import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.core.packedcodes import codes_layout, pack_codes, unpack_codes
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.quantized import round_to_nearest
from compressllm.core.scheme import SchemeName, parse_scheme

MASKS = {
    "2:4": lambda shape: NM(2, 4).keep(torch.rand(shape)),
    "odd rows": lambda shape: NM(1, 4).keep(torch.rand(shape)) & (torch.arange(shape[1]) < shape[1] - 4),
    "uneven": lambda shape: Unstructured(0.7, "layer").keep(torch.rand(shape)),
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "none": lambda shape: torch.zeros(shape, dtype=torch.bool),
}


@pytest.mark.parametrize("shape", [(6, 128), (5, 180), (3, 36), (1, 12)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", get_args(SchemeName))
def test_round_trip_is_exact(name, mask, shape):
    torch.manual_seed(0)
    scheme, keep = parse_scheme(name), MASKS[mask](shape)
    made = round_to_nearest(torch.randn(shape).bfloat16(), keep, scheme)
    tensors = dict(pack_codes("a.b", made, keep))
    layout = codes_layout("a.b", torch.bfloat16, keep, scheme)
    assert layout == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert list(layout) == list(tensors)
    back = unpack_codes("a.b", tensors.__getitem__, keep, torch.bfloat16)
    assert torch.equal(raw(back.codes), raw(made.codes))
    assert torch.equal(back.scales, made.scales)
    assert (back.bits, back.group, back.dtype) == (made.bits, made.group, torch.bfloat16)


@pytest.mark.parametrize(("name", "share"), [("int8", 0.3125), ("fp8", 0.3125), ("int4-g128", 0.1875)])
def test_share_of_bfloat16_at_2_of_4(name, share):
    layout = codes_layout("l", torch.bfloat16, NM(2, 4).keep(torch.rand(64, 256)), parse_scheme(name))
    stored = {part.removeprefix("l."): math.prod(shape) * dtype.itemsize for part, (dtype, shape) in layout.items()}
    assert sum(stored.values()) - stored["scales"] == share * 64 * 256 * 2
    assert stored["scales"] == 2 * 64 * (2 if "g128" in name else 1)


def test_two_codes_of_four_bits_lie_in_a_byte_the_first_below():
    codes = torch.tensor([[7.0, 0.0, -7.0, 0.0, 3.0, 0.0]])
    keep = codes != 0
    made = round_to_nearest(codes, keep, parse_scheme("int4-g32"))
    values = dict(pack_codes("l", made, keep))["l.values"]
    assert values.tolist() == [[0x97, 0x03]]  # -7 is 9 in four bits


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("values", lambda t: t[:, :-1], "not codes of what its bitmask keeps"),
        ("values", lambda t: t.int(), "not codes"),
        ("scales", lambda t: t.float(), "needs float16"),
        ("scales", lambda t: torch.cat([t, t], 1), r"needs float16, \(4, 2 or 1\)"),
    ],
)
def test_damage_is_found(part, change, message):
    keep = NM(2, 4).keep(torch.rand(4, 64))
    tensors = dict(pack_codes("l", round_to_nearest(torch.randn(4, 64), keep, parse_scheme("int4-g32")), keep))
    tensors[f"l.{part}"] = change(tensors[f"l.{part}"])
    with pytest.raises(FormatError, match=message):
        unpack_codes("l", tensors.__getitem__, keep, torch.float32)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_one_scale_a_row_is_the_same_in_any_order(name):
    keep, scheme = NM(2, 4).keep(torch.rand(8, 96)), parse_scheme(name)
    weight, order = torch.randn(8, 96).bfloat16(), torch.randperm(96)
    made, plain = round_to_nearest(weight, keep, scheme, order=order), round_to_nearest(weight, keep, scheme)
    assert made.order is None
    assert torch.equal(made.dequantize(), plain.dequantize())


def test_groups_in_an_order_of_inputs_come_back():
    keep = NM(2, 4).keep(torch.rand(8, 96, generator=torch.Generator().manual_seed(0)))
    order, scheme = torch.randperm(96, generator=torch.Generator().manual_seed(1)), parse_scheme("int4-g32")
    made = round_to_nearest(torch.randn(8, 96).bfloat16(), keep, scheme, order=order)
    tensors = dict(pack_codes("l", made, keep))
    layout = codes_layout("l", torch.bfloat16, keep, scheme, ordered=True)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == layout
    back = unpack_codes("l", tensors.__getitem__, keep, torch.bfloat16, ordered=True)
    assert torch.equal(back.dequantize(), made.dequantize())
    assert not torch.equal(back.dequantize(), replace(back, order=None).dequantize())
    tensors["l.order"][0] = tensors["l.order"][1]
    with pytest.raises(FormatError, match="l: its order does not name each of 96 inputs once"):
        unpack_codes("l", tensors.__getitem__, keep, torch.bfloat16, ordered=True)
