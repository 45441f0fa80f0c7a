"""Packed 2:4 weights: neurons are gathered in groups that keep the pattern."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from compressllm.contextual.attach import Contextual, prompt_through
from compressllm.contextual.coarse import PromptMlp
from compressllm.contextual.decode import Decoding
from compressllm.contextual.fine import TokenMlp
from compressllm.contextual.sirius import Sirius
from compressllm.core.errors import UnsupportedModelError
from compressllm.core.gathered import Gathered
from compressllm.core.pattern import NM
from compressllm.kernels.linear import SparseLinear
from compressllm.kernels.native.library import unavailable

PATTERN = NM(2, 4)


@pytest.fixture
def packed(model: PreTrainedModel) -> PreTrainedModel:
    """The tiny Llama, its MLPs at 2:4 and packed by the backend that runs everywhere."""
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(block.mlp, name)
            keep = PATTERN.keep(linear.weight.abs())
            linear.weight.data.mul_(keep)
            setattr(block.mlp, name, SparseLinear.from_linear(linear, keep, PATTERN, "reference"))
    return model


def test_gathered_neurons_are_packed_and_compute_what_masked_ones_do(packed: PreTrainedModel, prompt: Tensor) -> None:
    contextual = Contextual(packed, "griffin", 0.5)
    prompt_through(contextual, prompt)
    x = torch.randn(1, 2, 32, dtype=torch.float64)
    for runner in contextual.runners:
        assert isinstance(runner, PromptMlp)
        assert runner.index is not None
        assert isinstance(runner._down, SparseLinear)
        assert runner.index.view(-1, 4).diff().eq(1).all(), "whole groups"
        assert (runner.index[::4] % 4 == 0).all(), "aligned groups"
        assert PATTERN.violations(runner._down.weight != 0) == 0
        mask = torch.zeros(48, dtype=torch.float64)
        mask[runner.index] = 1
        right = runner.mlp.down(runner.mlp.activations(x)[1] * mask)
        torch.testing.assert_close(runner.draft(x), right)


def test_neurons_are_not_cut_out_of_inputs_in_an_order_of_their_own(packed: PreTrainedModel, prompt: Tensor) -> None:
    mlp = packed.model.layers[1].mlp
    pattern = Gathered.of(PATTERN, torch.randperm(48))
    weight = torch.randn(32, 48, dtype=torch.float64)
    keep = pattern.keep(weight)
    mlp.down_proj = SparseLinear(weight * keep, keep, None, pattern, "reference")
    with pytest.raises(UnsupportedModelError, match="its down projection is 2:4 gathered, and neurons cannot be cut"):
        prompt_through(Contextual(packed, "griffin", 0.5), prompt)


def test_kernels_compute_gathered_neurons_too(build_model: Callable[..., PreTrainedModel], prompt: Tensor) -> None:
    if reason := unavailable():
        pytest.skip(reason)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = build_model(config)
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, name)
        linear.weight.data = linear.weight.bfloat16().float()  # what the kernel holds
        keep = PATTERN.keep(linear.weight.abs())
        linear.weight.data.mul_(keep)
        setattr(mlp, name, SparseLinear.from_linear(linear, keep, PATTERN, "native"))
    contextual = Contextual(model, "griffin", 0.5)
    prompt_through(contextual, prompt)
    (runner,) = contextual.runners
    assert isinstance(runner, PromptMlp)
    assert isinstance(runner._down, SparseLinear)
    assert runner._down.backend == "native"
    mask = torch.zeros(64)
    mask[runner.index] = 1
    x = torch.randn(1, 2, 32)
    torch.testing.assert_close(runner.draft(x), runner.mlp.down(runner.mlp.activations(x)[1] * mask))


@pytest.mark.parametrize("selector", ["griffin", "topk"])
def test_a_packed_model_is_corrected_to_its_own_dense_text(
    selector: str, packed: PreTrainedModel, prompt: Tensor, dense_text: Callable[..., list[int]]
) -> None:
    right = dense_text(packed, prompt, 10)
    contextual = Contextual(packed, selector, 0.3)
    made = [token for span in Decoding(contextual, prompt, 10, Sirius(4, 0.6)).spans() for token in span]
    assert made == right
    for runner in contextual.runners:
        if isinstance(runner, TokenMlp):
            assert runner.read() == runner.planned() == 1, "nothing is skipped in packed weights, and none is claimed"
