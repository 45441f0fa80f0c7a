import pytest
import torch

from compressllm.core.errors import FormatError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM
from compressllm.core.quantized import round_to_nearest
from compressllm.core.scheme import parse_scheme
from compressllm.core.stockcodes import pack_stock, stock_config, stock_layout, stock_refuses, unpack_stock

SCHEMES = ("int8", "int8-dynamic", "int4-g32", "int4-g64", "fp8", "fp8-dynamic")


def rounded(scheme, dtype=torch.bfloat16):
    torch.manual_seed(0)
    weight = torch.randn(5, 192).to(dtype)
    keep = NM(2, 4).keep(weight.float().abs())
    return round_to_nearest(weight.masked_fill(~keep, 0.0), keep, parse_scheme(scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_come_back(scheme):
    made = rounded(scheme)
    packed = dict(pack_stock("layer", made))
    layout = stock_layout("layer", torch.bfloat16, (5, 192), parse_scheme(scheme))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == layout
    back = unpack_stock("layer", packed.__getitem__, (5, 192), parse_scheme(scheme))
    assert torch.equal(back.codes.float(), made.codes.float())
    assert torch.equal(back.scales, made.scales)
    assert back.scheme == made.scheme == parse_scheme(scheme)
    assert torch.equal(back.dequantize().view(torch.int16), (made.dequantize() + 0.0).view(torch.int16))


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4-g64", 4)])
def test_words_hold_codes_from_their_lowest_bits(scheme, bits):
    made = rounded(scheme)
    words = dict(pack_stock("layer", made))["layer.weight_packed"]
    for row in range(5):
        for column in range(192):
            word = words[row, column * bits // 32].item() % 2**32
            assert (word >> (column * bits % 32)) % 2**bits - 2 ** (bits - 1) == made.codes[row, column].item()


def test_float8_has_no_negative_zero():
    made = rounded("fp8")
    made.codes.view(torch.uint8)[0, 0] = 0x80
    assert not (raw(dict(pack_stock("layer", made))["layer.weight"]) == -128).any()


def test_what_does_not_fit():
    assert stock_refuses(parse_scheme("int4-g128"), 576) == (
        "576 inputs are no multiple of 128, which compressed-tensors needs; quantise to int4-g64"
    )
    assert "name it under skip" in str(stock_refuses(parse_scheme("int4-g128"), 72))
    assert stock_refuses(parse_scheme("int8"), 72) is None
    packed = dict(pack_stock("layer", rounded("int8")))
    with pytest.raises(FormatError, match=r"layer.weight_packed: is torch.int32 \(5, 48\), int4-g64 needs"):
        unpack_stock("layer", packed.__getitem__, (5, 192), parse_scheme("int4-g64"))
    made = rounded("int8", torch.float32)
    made.scales.add_(1e-6)
    with pytest.raises(FormatError, match="does not hold its scales"):
        list(pack_stock("layer", made.to(torch.bfloat16)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_config_names_no_sparsity(scheme):
    config = stock_config(parse_scheme(scheme), ["lm_head"])
    assert "sparsity_config" not in config
    assert config["format"] == {"int8-d": "int-quantized", "fp8": "float-quantized", "fp8-dy": "float-quantized"}.get(
        scheme[:6], "pack-quantized"
    )
