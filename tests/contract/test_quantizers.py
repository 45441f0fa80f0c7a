"""Every registered quantizer keeps the mask, on every scheme, and does the same twice."""

from typing import get_args

import pytest
import torch

from compressllm.core.masks import raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import QUANTIZERS
from compressllm.core.registry import build
from compressllm.core.scheme import SchemeName, parse_scheme
from compressllm.core.stats import StatsAccumulator


@pytest.fixture
def stats():
    torch.manual_seed(0)
    accumulator = StatsAccumulator(frozenset({"hessian", "sqnorm", "mean", "var"}))
    inputs = torch.randn(300, 76) @ torch.randn(76, 76)
    inputs[:, 5] = 0.0  # a dead input
    accumulator.add_(inputs)
    return accumulator.finish("layer")


def test_there_are_quantizers():
    assert {"gptq", "rtn"} <= set(QUANTIZERS.names())


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.7, "layer"), Unstructured(0.0)], ids=str)
@pytest.mark.parametrize("scheme", get_args(SchemeName))
@pytest.mark.parametrize("name", QUANTIZERS.names())
def test_quantizer_keeps_its_contract(name, scheme, pattern, stats):
    weight = torch.randn(9, 76).bfloat16().float()
    keep = pattern.keep(weight.abs())
    keep[3] = False  # a row of nothing
    weight.masked_fill_(~keep, 0.0)
    before = weight.clone()
    once, again = (build(QUANTIZERS, name).quantize(weight, keep, stats, parse_scheme(scheme)) for _ in range(2))
    assert str(once.weight.scheme) == (scheme if scheme != "int4-g128" else "int4")  # 76 inputs are one group of 128
    assert torch.equal(raw(once.weight.codes), raw(again.weight.codes))
    assert torch.equal(once.weight.scales, again.weight.scales)
    left = once.weight.dequantize(torch.float32)
    assert left.isfinite().all()
    assert not raw(left)[~keep].any()  # +0.0 to the bit
    assert torch.equal(weight, before)
    size = weight.norm()
    assert (left - weight).norm() < size * {"int8": 0.03, "fp8": 0.1}.get(scheme, 0.5)
