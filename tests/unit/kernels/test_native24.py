"""The backend ``native``: what it refuses, and a model that runs on it."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM, Unstructured
from compressllm.kernels.linear import SparseLinear, choose_backend
from compressllm.kernels.native.library import unavailable
from compressllm.kernels.native24 import Native
from compressllm.kernels.swapper import Swapper, swap_linears_
from compressllm.models.blocks import all_linears

PATTERN = NM(2, 4)
WEIGHT = torch.ones(16, 64).bfloat16()


@pytest.fixture
def compiler():
    if reason := unavailable():
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("weight", "pattern", "reason"),
    [
        (WEIGHT.half(), PATTERN, "its weights are torch.bfloat16 or quantised, not torch.float16"),
        (WEIGHT.to("meta"), PATTERN, "runs on CPUs, not on meta"),
        (WEIGHT, NM(4, 8), "runs what 2:4 can hold, not 4:8"),
        (WEIGHT, Unstructured(0.5), "runs what 2:4 can hold, not 0.5"),
        (WEIGHT[:, :62], PATTERN, "62 inputs are not a multiple of 4"),
    ],
)
def test_says_what_it_does_not_take(weight, pattern, reason):
    assert Native().refuses(weight, pattern) == reason


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2), NM(2, 8), NM(1, 8)], ids=str)
def test_takes_what_2_of_4_can_hold(pattern):
    keep = pattern.keep(torch.rand(16, 64))
    assert Native().refuses(WEIGHT, pattern) is None
    assert Native().pack(WEIGHT.masked_fill(~keep, 0), keep)


def test_without_kernels_auto_falls_back_to_dense_and_says_why(monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_NATIVE", "0")
    choice = choose_backend(WEIGHT, PATTERN)
    assert choice.name == "dense"
    assert choice.refused["native"] == "switched off by COMPRESSLLM_NATIVE=0"


@pytest.fixture
def linear(compiler) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(64, 33).bfloat16()
    made.weight.data[~PATTERN.keep(made.weight.float().abs())] = 0.0
    return made


def test_holds_nine_sixteenths_and_the_padding(linear):
    sparse = SparseLinear.from_linear(linear, linear.weight != 0, PATTERN, "native")
    assert sum(buffer.nbytes for buffer in sparse.buffers()) == 48 * 64 * 2 * 9 // 16


def test_casts_and_copies_like_any_module(linear):
    sparse = SparseLinear.from_linear(linear, linear.weight != 0, PATTERN, "native")
    x = torch.randn(3, 64)
    wide = copy.deepcopy(sparse).float()
    torch.testing.assert_close(wide(x), copy.deepcopy(linear).float()(x))
    assert torch.equal(wide.weight, linear.weight.float())
    assert wide.weight.dtype == torch.float32
    assert sparse(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_what_came_before(linear):
    sparse = SparseLinear.from_linear(linear, linear.weight != 0, PATTERN, "native")
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    sparse(x).float().sum().backward()
    expected = torch.autograd.grad(linear(x).float().sum(), x)[0]
    assert torch.equal(x.grad, expected)
    assert sparse.bias.grad is not None


@pytest.fixture
def models(compiler) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A 2:4 model, and the same on native kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    dense = LlamaForCausalLM(config).bfloat16().eval()
    for linear in all_linears(dense).values():
        linear.weight.data[~PATTERN.keep(linear.weight.float().abs())] = 0.0
    masks = MaskStore()
    for name, linear in all_linears(dense).items():
        masks[name] = linear.weight != 0
    sparse = copy.deepcopy(dense)
    report = swap_linears_(sparse, Swapper(masks, dict.fromkeys(masks, PATTERN), "native"))
    assert {choice.name for choice in report.values()} == {"native"}
    return dense, sparse


@torch.no_grad()
def test_a_model_runs_and_generates_on_it(models):
    dense, sparse = models
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=0.05, atol=0.02)
    assert sparse.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 8)


@torch.no_grad()
def test_a_model_compiles_into_one_graph(models):
    _, sparse = models
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, sparse(ids).logits, rtol=0.05, atol=0.02)
