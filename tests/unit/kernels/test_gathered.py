"""Linears that gather their inputs."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressllm.core.gathered import Gathered
from compressllm.core.masks import MaskStore, raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import quantize_absmax
from compressllm.core.registry import build
from compressllm.kernels.linear import SparseLinear, choose_backend, in_its_order
from compressllm.kernels.swapper import Swapper, swap_linears_
from compressllm.models.blocks import all_linears

PATTERN = Gathered.of(NM(2, 4), torch.randperm(64, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(64, 24).bfloat16()
    made.weight.data[~PATTERN.keep(made.weight.float().abs())] = 0.0
    return made


def able(weight, pattern) -> list[str]:
    return [name for name in BACKENDS.names() if not build(BACKENDS, name).refuses(weight, pattern, wanted=True)]


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_backend_computes_the_linear(linear, tokens):
    keep, x = linear.weight != 0, torch.randn(2, tokens, 64).bfloat16()
    wanted = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    names = able(linear.weight.index_select(1, PATTERN.places), PATTERN.base)
    assert {"dense", "reference"} <= set(names)
    for name in names:
        made = SparseLinear(linear.weight, keep, linear.bias, PATTERN, name)
        torch.testing.assert_close(made(x).float(), wanted, rtol=2e-2, atol=2e-2)
        assert torch.equal(raw(made.weight), raw(linear.weight)), name
        assert torch.equal(raw(made.state_dict()["weight"]), raw(linear.weight))
        assert "2:4 gathered" in repr(made)


def test_the_kernels_of_its_pattern_are_asked(linear, monkeypatch):
    asked = []
    refuses = type(build(BACKENDS, "dense")).refuses

    def noted(self, weight, pattern, wanted=False):
        asked.append((weight, pattern))
        return refuses(self, weight, pattern, wanted)

    monkeypatch.setattr(type(build(BACKENDS, "dense")), "refuses", noted)
    choose_backend(linear.weight, PATTERN)
    ((weight, pattern),) = asked
    assert pattern == NM(2, 4)
    assert NM(2, 4).violations(weight != 0) == 0


def test_a_dense_copy_takes_inputs_as_they_come(linear):
    made = SparseLinear(linear.weight, linear.weight != 0, linear.bias, PATTERN, "reference", dense_from=4)
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(made(x), linear(x))
    torch.testing.assert_close(made(x[:2]), linear(x[:2]), rtol=2e-2, atol=2e-2)


def test_one_scale_a_row_goes_along_and_groups_do_not(linear):
    keep, x = linear.weight != 0, torch.randn(3, 64).bfloat16()
    rows = quantize_absmax(linear.weight, keep, 8, 64)
    made = SparseLinear(rows, keep, None, PATTERN, "reference")
    torch.testing.assert_close(made(x), nn.functional.linear(x, rows.dequantize()), rtol=2e-2, atol=2e-2)
    assert made.order is not None
    assert torch.equal(made.weight, SparseLinear(rows, keep, None, Unstructured(0.5), "reference").weight)
    groups = quantize_absmax(linear.weight, keep, 8, 32)  # of inputs as they come
    choice = choose_backend(groups, PATTERN)
    assert choice.name not in {"native", "cusparselt", "sparse_mma"}
    other = SparseLinear(groups, keep, None, PATTERN, "reference")
    assert other.order is None
    assert torch.equal(other.weight, SparseLinear(groups, keep, None, Unstructured(0.5), "reference").weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_in_the_order_go_along(linear, bits):
    keep, x = linear.weight != 0, torch.randn(3, 64).bfloat16()
    made = quantize_absmax(linear.weight, keep, bits, 32, PATTERN.places)
    ordered = quantize_absmax(PATTERN.ordered(linear.weight), PATTERN.ordered(keep), bits, 32)
    assert torch.equal(PATTERN.ordered(made.dequantize()), ordered.dequantize())
    names = able(*in_its_order(made, PATTERN)[:2])
    assert "reference" in names
    for name in names:
        sparse = SparseLinear(made, keep, None, PATTERN, name)
        assert sparse.order is not None
        torch.testing.assert_close(sparse(x), nn.functional.linear(x, made.dequantize()), rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(sparse.weight.float(), made.dequantize(torch.float32), rtol=1e-2, atol=1e-3)
    other = Gathered.of(NM(2, 4), PATTERN.places.flip(0).roll(1))  # holds in another order than its groups lie in
    weight, pattern, order = in_its_order(made, other)
    assert pattern == Unstructured(0.5)
    assert torch.equal(order, PATTERN.places)
    assert torch.equal(weight.codes, PATTERN.ordered(made.codes))


def test_a_compiled_linear_is_one_graph(linear):
    made = SparseLinear(linear.weight, linear.weight != 0, linear.bias, PATTERN, "dense")
    x = torch.randn(2, 64).bfloat16()
    assert made.order is not None
    assert torch.equal(torch.compile(made, backend="eager", fullgraph=True)(x), made(x))


def test_a_model_swaps():
    config = LlamaConfig(
        vocab_size=70, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    masks, patterns = MaskStore(), {}
    for name, linear in all_linears(model).items():
        patterns[name] = Gathered.of(NM(2, 4), torch.randperm(linear.shape[1]))
        masks[name] = patterns[name].keep(linear.weight.abs())
        linear.weight.data[~masks[name]] = 0.0
    ids = torch.randint(0, 70, (1, 9))
    wanted = copy.deepcopy(model)(ids).logits
    swapper = Swapper(masks, patterns, "reference")
    shapes = {name: linear.shape for name, linear in all_linears(model).items()}
    assert list(swapper.choose_ahead(shapes, torch.float32, torch.device("cpu"))) == [
        "64x64 2:4", "64x96 2:4", "96x64 2:4",
    ]  # fmt: skip
    swap_linears_(model, swapper)
    torch.testing.assert_close(model(ids).logits, wanted)
