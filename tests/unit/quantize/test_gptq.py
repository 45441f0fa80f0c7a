import pytest
import torch
from torch import Tensor

from compressllm.core.errors import RecipeError
from compressllm.core.layererror import relative_error
from compressllm.core.pattern import NM
from compressllm.core.protocols import QUANTIZERS
from compressllm.core.registry import build
from compressllm.core.scheme import parse_scheme
from compressllm.core.stats import InputStats


def layer(columns: int = 96, rows: int = 12) -> tuple[Tensor, InputStats]:
    """A weight, and correlated inputs: their first directions are larger."""
    torch.manual_seed(0)
    inputs = torch.randn(500, columns) @ (torch.randn(columns, columns) / torch.arange(1, columns + 1)[:, None])
    return torch.randn(rows, columns), InputStats(tokens=500, hessian=(inputs.T @ inputs / 500))


def slowly(
    weight: Tensor, keep: Tensor, hessian: Tensor, largest: int, group: int, scales: Tensor | None = None
) -> Tensor:
    """Column by column, with the inverse of what is left of the Hessian taken anew; what the codes stand for.

    ``scales``: (out, in), in place of those of each group as it has become.
    """
    work, hessian = weight.double().clone(), hessian.double()
    columns = weight.shape[1]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    made = torch.zeros_like(work)
    for column in range(columns):
        if column % group == 0:
            its = (work * keep)[:, column : column + group]
            scale = (its.abs().amax(1) / largest).bfloat16().half().double()
        if scales is not None:
            scale = scales[:, column]
        code = (work[:, column] / scale).round().clamp(-largest, largest) * keep[:, column]
        made[:, column] = code * scale
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (work[:, column] - made[:, column]) / inverse[0, 0]
        work[:, column:] -= error[:, None] * inverse[0]
    return made


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(("scheme", "largest", "group"), [("int8", 127, 96), ("int4-g32", 7, 32), ("int4-g64", 7, 64)])
@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_is_ordinary_gptq_and_the_same_under_a_mask(pattern, scheme, largest, group, block):
    weight, stats = layer()
    keep = torch.ones_like(weight).bool() if pattern == "dense" else NM(2, 4).keep(weight.abs())
    weight = weight * keep
    made = build(QUANTIZERS, {"gptq": {"order": "natural", "block": block}}).quantize(
        weight, keep, stats, parse_scheme(scheme)
    )
    expected = slowly(weight, keep, stats.need("hessian"), largest, group)
    apart = (made.weight.dequantize(torch.float64) - expected).abs()
    step = made.weight.scales.repeat_interleave(made.weight.group, 1)[:, :96]
    assert (apart < 1e-3 * step).float().mean() > 0.98  # a rounding that falls the other way moves what is behind it
    assert not made.weight.codes[~keep].any()


@pytest.mark.parametrize(("scheme", "largest", "group"), [("int8", 127, 96), ("int4-g32", 7, 32), ("int4-g64", 7, 64)])
@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_by_size_of_inputs_it_is_ordinary_gptq_of_the_ordered_columns(pattern, scheme, largest, group):
    weight, stats = layer()
    keep = torch.ones_like(weight).bool() if pattern == "dense" else NM(2, 4).keep(weight.abs())
    weight = weight * keep
    made = build(QUANTIZERS, "gptq").quantize(weight, keep, stats, parse_scheme(scheme))
    scales = torch.zeros(12, 96, dtype=torch.float64)
    for start in range(0, 96, group):
        its = weight[:, start : start + group].double()
        scales[:, start : start + group] = (its.abs().amax(1) / largest).bfloat16().half().double()[:, None]
    order = sorted(range(96), key=lambda column: -float(stats.need("hessian")[column, column]))
    ordered = stats.need("hessian")[order][:, order]
    expected = torch.zeros(12, 96, dtype=torch.float64)
    expected[:, order] = slowly(weight[:, order], keep[:, order], ordered, largest, 96, scales[:, order])
    apart = (made.weight.dequantize(torch.float64) - expected).abs()
    assert (apart < 1e-3 * scales).float().mean() > 0.98
    assert not made.weight.codes[~keep].any()


def test_the_order_by_size_helps_where_inputs_differ_in_size():
    weight, stats = layer()
    keep = NM(2, 4).keep(weight.abs())
    weight = weight * keep
    back = torch.randperm(96, generator=torch.Generator().manual_seed(1))  # or the natural order is by size already
    mixed = InputStats(tokens=500, hessian=stats.need("hessian")[back][:, back])
    errors = {}
    for order in ("natural", "activation"):
        quantizer = build(QUANTIZERS, {"gptq": {"order": order}})
        made = quantizer.quantize(weight[:, back], keep[:, back], mixed, parse_scheme("int4-g32")).weight
        errors[order] = relative_error(weight[:, back], made.dequantize(torch.float32), mixed)
    assert errors["activation"] < errors["natural"]


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "int4-g128", "fp8"])
@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_beats_rounding_to_nearest_in_layer_error(pattern, scheme):
    weight, stats = layer()
    keep = torch.ones_like(weight).bool() if pattern == "dense" else NM(2, 4).keep(weight.abs())
    weight = weight * keep
    errors = {
        name: relative_error(
            weight,
            build(QUANTIZERS, name)
            .quantize(weight, keep, stats, parse_scheme(scheme))
            .weight.dequantize(torch.float32),
            stats,
        )
        for name in ("rtn", "gptq")
    }
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_options_are_checked():
    for options in ({"block": 0}, {"damping": 0.0}, {"order": "random"}):
        with pytest.raises(RecipeError, match="option"):
            build(QUANTIZERS, {"gptq": options})
