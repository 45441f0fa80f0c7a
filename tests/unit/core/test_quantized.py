import pytest
import torch

from compressllm.core.errors import FormatError
from compressllm.core.pattern import NM
from compressllm.core.quantized import QuantizedWeight, quantize_absmax


def sparse(rows=6, columns=72, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    weight[1, :40] = 0.0  # a group of zeros
    keep = NM(2, 4).keep(weight.abs())
    return weight.masked_fill(~keep, 0.0).to(dtype), keep


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128, 72])
def test_each_weight_goes_to_the_nearest_code_of_its_group(bits, group):
    weight, keep = sparse()
    group = min(group, 72) if group == 72 else group
    made = quantize_absmax(weight, keep, bits, group)
    largest = 127 if bits == 8 else 7
    for row in range(6):
        for start in range(0, 72, group):
            values = weight[row, start : start + group]
            scale = max((values.abs().max() / largest).bfloat16().half().item(), 2.0**-24)
            assert made.scales[row, start // group].item() == scale
            for column, value in enumerate(values.tolist()):
                code = max(-largest, min(largest, round(value / scale)))
                assert made.codes[row, start + column].item() == code
    assert (made.codes[~keep] == 0).all()
    step = made.scales.repeat_interleave(group, 1)[:, :72]
    # Rounding the scale down moves the largest weight past the last code, by no more than bfloat16 rounds.
    assert ((made.dequantize(torch.float32) - weight).abs() <= step * (0.5 + largest * 2.0**-9)).all()


def test_dequantized_is_codes_times_scales():
    weight, keep = sparse(dtype=torch.bfloat16)
    made = quantize_absmax(weight, keep, 8, 32)
    exact = [[made.codes[r, c].item() * made.scales[r, c // 32].item() for c in range(72)] for r in range(6)]
    assert torch.equal(made.dequantize(torch.float64), torch.tensor(exact, dtype=torch.float64))
    assert made.dtype == made.dequantize().dtype == torch.bfloat16
    assert made.to(torch.float32).dequantize().dtype == torch.float32
    assert made.shape == (6, 72)
    assert made.device.type == "cpu"


def test_scales_are_numbers_of_float16_and_bfloat16():
    weight, keep = sparse()
    made = quantize_absmax(weight * 1e-3, keep, 4, 32)
    assert torch.equal(made.scales.half().float(), made.scales)
    assert torch.equal(made.scales.bfloat16().float(), made.scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "3 bits"),
        ({"group": 48}, "group of 48 columns; supported are 32, 64, 128 and all 72"),
        ({"codes": torch.zeros(6, 72)}, r"codes are torch.float32 \(6, 72\)"),
        ({"scales": torch.zeros(6, 2)}, r"scales are torch.float32 \(6, 2\); .* needs float32 \(6, 3\)"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    parts = {"codes": torch.zeros(6, 72, dtype=torch.int8), "scales": torch.zeros(6, 3), "bits": 8, "group": 32}
    with pytest.raises(FormatError, match=message):
        QuantizedWeight(**(parts | change))


def test_weights_float16_cannot_scale():
    weight, keep = sparse()
    with pytest.raises(FormatError, match="scales of int8-g32 are float16"):
        quantize_absmax(weight * 1e8, keep, 8, 32)
