import math
from typing import get_args

import pytest
import torch

from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.quantized import round_to_nearest
from compressllm.core.scheme import SchemeName, parse_scheme


@pytest.mark.parametrize("name", get_args(SchemeName))
def test_names_are_read_back(name):
    assert str(parse_scheme(name)) == name


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(RecipeError, match=r"unknown scheme 'int4-g127'; did you mean 'int4-g128'\?"):
        parse_scheme("int4-g127")


def test_float8_goes_to_the_nearest_of_all_float8_numbers():
    torch.manual_seed(0)
    weight = torch.randn(4, 24).bfloat16()
    keep = torch.rand(4, 24) < 0.6
    keep[2] = False
    made = round_to_nearest(weight, keep, parse_scheme("fp8"))
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = [number for number in numbers.tolist() if math.isfinite(number)]
    for row in range(4):
        kept = [weight[row, c].item() for c in range(24) if keep[row, c]]
        scale = made.scales[row, 0].item()
        if kept:
            assert scale == 2.0 ** math.ceil(math.log2(max(map(abs, kept)) / 448))
        for column in range(24):
            value = weight[row, column].item() if keep[row, column] else 0.0
            nearest = min(abs(value / scale - number) for number in numbers)
            assert abs(value / scale - made.codes[row, column].float().item()) == nearest
    exact = made.codes.double() * made.scales.double()
    assert torch.equal(made.dequantize(torch.bfloat16).double(), exact)  # scales are powers of two


def test_powers_of_two_and_the_largest_code_fit():
    scheme = parse_scheme("fp8")
    assert scheme.scale(torch.tensor([[448.0], [449.0], [0.0], [224.0]])).tolist() == [1.0, 2.0, 2.0**-24, 0.5]


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e8])
def test_what_float16_cannot_scale_is_refused(name, value):
    with pytest.raises(FormatError, match=r"not finite; scales of .* are float16"):
        parse_scheme(name).scale(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize(("name", "largest"), [("int8-dynamic", 127.0), ("fp8-dynamic", 448.0)])
def test_each_token_is_rounded_by_a_scale_of_its_own(name, largest):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16) * torch.tensor([1.0, 1e-3, 1e3])[:, None]
    x[1, 1] = 0.0
    rounded = parse_scheme(name).round_tokens(x)
    for token, left in zip(x.flatten(0, 1), rounded.flatten(0, 1), strict=True):
        scale = token.abs().max().item() / largest or 1.0
        for value, got in zip(token.tolist(), left.tolist(), strict=True):
            scaled = torch.tensor(value / scale)
            code = scaled.round() if largest == 127.0 else scaled.to(torch.float8_e4m3fn).float()
            assert got == pytest.approx(code.item() * scale, rel=1e-6, abs=1e-12)
    assert parse_scheme(name).round_tokens(x.bfloat16()).dtype == torch.bfloat16
