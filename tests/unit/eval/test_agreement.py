import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.difference import relative_difference
from compressllm.core.errors import FormatError
from compressllm.eval.agreement import logit_difference, shared_ids
from compressllm.models.bundle import Bundle


def test_relative_difference() -> None:
    assert relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -4.0])) == 1.5
    assert relative_difference(torch.zeros(3), torch.zeros(3)) == 0.0
    assert not relative_difference(torch.tensor([float("nan")]), torch.ones(1)) <= 1e-5


def test_difference_is_that_of_whole_forwards(llama: PreTrainedModel, windows: Tensor) -> None:
    other = copy.deepcopy(llama)
    assert logit_difference(Bundle(llama), Bundle(other), windows) == 0.0
    other.model.layers[1].mlp.down_proj.weight.data[3, 5] += 0.1
    with torch.no_grad():
        one, two = llama(windows).logits, other(windows).logits
    expected = float((one - two).abs().max() / two.abs().max())
    assert logit_difference(Bundle(llama), Bundle(other), windows) == pytest.approx(expected, rel=1e-3)


def test_ids_fit_both_models_and_are_the_same_every_time(llama: PreTrainedModel) -> None:
    ids, source = shared_ids(Bundle(llama), Bundle(llama), 150)
    assert ids.shape == (2, 64)
    assert source == "128 random tokens"
    assert int(ids.max()) < 64
    assert torch.equal(ids, shared_ids(Bundle(llama), Bundle(llama), 150)[0])


def test_models_of_different_vocabulary_are_refused(llama: PreTrainedModel, windows: Tensor) -> None:
    other = copy.deepcopy(llama)
    other.resize_token_embeddings(70)
    with pytest.raises(FormatError, match="vocabulary of 64, the other of 70"):
        logit_difference(Bundle(llama), Bundle(other), windows)
