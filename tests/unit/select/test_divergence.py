import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.select.divergence import response_divergence
from compressllm.select.encoding import Encoded

BATCH = [
    Encoded((5, 9, 11, 20, 33), 2, True),
    Encoded((7, 8), 1, True),
    Encoded((1, 40, 41, 42, 43, 44, 45, 46, 47, 48), 7, True),
]


def one_by_one(dense: PreTrainedModel, pruned: PreTrainedModel, record: Encoded) -> Tensor:
    """Both divergences from the definition, in float64, one token after the other."""
    found = []
    with torch.no_grad():
        logits = [model(torch.tensor([record.ids])).logits[0].double() for model in (dense, pruned)]
    for position in range(record.start - 1, len(record.ids) - 1):
        p, q = (one[position].softmax(dim=0) for one in logits)
        mean = (p + q) / 2

        def kl(a: Tensor, b: Tensor) -> float:
            return sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(a, b, strict=True))

        found.append([kl(p, mean) / 2 + kl(q, mean) / 2, kl(p, q)])
    return torch.tensor(found, dtype=torch.float64).mean(dim=0)


def changed(model: PreTrainedModel, size: float = 0.3) -> PreTrainedModel:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data.add_(size * torch.randn_like(parameter) * parameter.std())
    return other


def test_is_the_definition_for_any_architecture(decoder: PreTrainedModel) -> None:
    pruned = changed(decoder)
    found = response_divergence(decoder, pruned, BATCH)
    expected = torch.stack([one_by_one(decoder, pruned, record) for record in BATCH])
    assert (expected > 1e-4).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_a_batch_is_what_its_records_are_alone(llama: PreTrainedModel) -> None:
    pruned = changed(llama)
    together = response_divergence(llama, pruned, BATCH)
    alone = torch.cat([response_divergence(llama, pruned, [one]) for one in BATCH])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_is_nothing_for_equal_models_and_at_most_ln_2(llama: PreTrainedModel) -> None:
    assert response_divergence(llama, llama, BATCH).max() < 1e-6
    sure, other = copy.deepcopy(llama), copy.deepcopy(llama)
    sure.lm_head.weight.data.mul_(1000)
    other.lm_head.weight.data.mul_(-1000)
    found = response_divergence(sure, other, BATCH)[:, 0]
    assert found.isfinite().all()
    torch.testing.assert_close(found, torch.full((3,), math.log(2)), rtol=1e-3, atol=0)


def test_only_the_response_counts(llama: PreTrainedModel) -> None:
    """Moving the start moves what is averaged: two halves make the whole."""
    pruned, ids = changed(llama), BATCH[2].ids
    whole = response_divergence(llama, pruned, [Encoded(ids, 1, True)])[0]
    late = response_divergence(llama, pruned, [Encoded(ids, 7, True)])[0]
    early = response_divergence(llama, pruned, [Encoded(ids[:7], 1, True)])[0]
    torch.testing.assert_close(whole * 9, early * 6 + late * 3, rtol=1e-4, atol=1e-6)


def test_logits_of_minus_infinity_are_no_trouble(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = changed(llama)
    plain: Callable[..., Tensor] = torch.nn.functional.linear

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made = plain(x, weight, bias)
        if made.shape[-1] == llama.config.vocab_size:
            made[..., -3:] = -torch.inf
        return made

    monkeypatch.setattr(torch.nn.functional, "linear", masked)
    assert response_divergence(llama, pruned, BATCH).isfinite().all()
