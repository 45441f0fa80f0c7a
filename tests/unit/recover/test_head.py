"""Heads of real architectures, as what they compute."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PreTrainedModel

from compressllm.core.errors import UnsupportedModelError
from compressllm.recover.head import Head, bf16_products, head_of, hidden_states
from compressllm.recover.headloss import head_loss
from compressllm.recover.losses import LossWeights

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SHAPED = {
    "cohere": (lambda: CohereConfig(**SHAPE, logit_scale=0.25), {"scale": 0.25}),
    "granite": (lambda: GraniteConfig(**SHAPE, logits_scaling=8.0), {"scale": 0.125}),
    "gemma2": (lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.5), {"softcap": 0.5}),
}


def check(model: PreTrainedModel) -> None:
    """Cross entropy at the head is the model's own loss, and so are the gradients of all parameters."""
    model.requires_grad_(True)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    hidden = hidden_states(model, {"input_ids": ids, "labels": labels})
    loss, _ = head_loss(hidden.flatten(0, 1), head_of(model), labels.flatten(), None, LossWeights(ce=1.0))
    own = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    wanted, got = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (own, loss))
    assert any(one is not None for one in wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_loss_is_the_models_own(decoder: PreTrainedModel) -> None:
    check(decoder)


@pytest.mark.parametrize("name", sorted(SHAPED))
def test_scaled_and_capped_logits(name: str, build_model: Callable[..., PreTrainedModel]) -> None:
    config, expected = SHAPED[name]
    model = build_model(config())
    head = head_of(model)
    assert {key: getattr(head, key) for key in expected} == expected
    check(model)


def test_a_head_tied_to_the_embedding(build_model: Callable[..., PreTrainedModel]) -> None:
    model = build_model(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(model)


def test_a_head_of_another_kind_is_refused(llama: PreTrainedModel) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    llama.lm_head.__class__ = Doubled
    with pytest.raises(UnsupportedModelError, match="gives other logits than its weight does, by 50%"):
        head_of(llama)


def test_bfloat16_model(llama: PreTrainedModel) -> None:
    head = head_of(llama.to(torch.bfloat16))
    assert head.weight.dtype == torch.bfloat16
    assert replace(head, scale=1.0).vocab_size == 64


def _setting() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)


@pytest.mark.skipif(_setting() is None, reason="this torch cannot be told how to round the inputs of products")
def test_products_are_rounded_within_and_as_before_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressllm.recover.head.multiplies_bf16_faster", lambda device: True)
    setting, half, wide = _setting(), torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    before = setting.fp32_precision
    with bf16_products(half, wide):  # a float32 factor would be rounded
        assert setting.fp32_precision == before
    with bf16_products(half, half):
        assert setting.fp32_precision == "bf16"
    with contextlib.suppress(ValueError), bf16_products(half, half):
        raise ValueError
    assert setting.fp32_precision == before


@pytest.mark.skipif(_setting() is None, reason="this torch cannot be told how to round the inputs of products")
def test_rounded_products_lose_nothing_of_bfloat16_factors() -> None:
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 96, generator=random).bfloat16() for n in (70, 4000))
    exact = hidden.double() @ weight.double().T
    with bf16_products(hidden, weight):
        out = Head(weight).prepared(torch.float32).logits_(hidden.float(), torch.empty(70, 4000))
    assert float((out - exact).abs().max()) < 1e-5 * float(exact.abs().max())
