"""Linears that are no nn.Linear: the (out, in) weight in whatever form it is held."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM
from compressllm.kernels.swapper import Swapper, swap_linears_
from compressllm.models.blocks import all_linears
from compressllm.models.bundle import Bundle
from compressllm.models.facts import LinearFacts
from compressllm.models.linears import held_otherwise, linears_of
from compressllm.models.weights import LiveWeights
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model

C_FC = "transformer.h.1.mlp.c_fc"


def with_linears(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with an nn.Linear in the place of every Conv1D."""
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight.data, linear.bias.data = module.weight.data.T.clone(), module.bias.data.clone()
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, linear)
    return twin


@pytest.mark.parametrize("method", ["magnitude", "wanda", "random"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5/row", "0.5/layer"])
def test_a_conv1d_is_pruned_as_its_transposed_linear(
    gpt2: PreTrainedModel, windows: Tensor, tmp_path: Path, method: str, pattern: str
) -> None:
    np.save(tmp_path / "ids.npy", windows.numpy())
    config = PruneConfig(method=method, pattern=pattern, calibration={"source": str(tmp_path / "ids.npy")})
    expected = prune_model(Bundle(with_linears(gpt2)), config)
    found = prune_model(Bundle(gpt2), config)
    assert list(found.masks) == list(expected.masks) == list(all_linears(gpt2))
    assert len(found.masks) == 12
    for name in found.masks:
        assert torch.equal(found.masks[name], expected.masks[name]), name
        assert torch.equal(gpt2.get_submodule(name).weight.T, expected.model.get_submodule(name).weight), name


def test_a_transposed_weight_is_read_and_replaced_as_out_in(gpt2: PreTrainedModel) -> None:
    module, weights = gpt2.get_submodule(C_FC), LiveWeights(gpt2)
    before = module.weight.detach().clone()
    weight = weights.read(f"{C_FC}.weight")
    assert weight.shape == (48, 32)
    assert weight.is_contiguous()  # as an nn.Linear's is, so that a method computes the same bits
    assert torch.equal(weight.T, before)
    weights.replace_(f"{C_FC}.weight", weight * 2)
    assert torch.equal(module.weight, before * 2)
    assert torch.equal(weights.read(f"{C_FC}.bias"), module.bias)


def test_a_linears_weight_is_a_view(gpt2: PreTrainedModel) -> None:
    linear = all_linears(gpt2)[C_FC]
    assert (linear.shape, linear.transposed) == ((48, 32), True)
    linear.weight[3] = 7.0
    assert (gpt2.get_submodule(C_FC).weight[:, 3] == 7.0).all()


def test_plain_linears_are_not_special(llama: PreTrainedModel) -> None:
    assert held_otherwise(llama) == {}
    assert linears_of(llama.model.norm, "model.norm") == []
    linear = all_linears(llama)["model.layers.0.mlp.up_proj"]
    assert linear.weight.data_ptr() == llama.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert linear.form is None


def test_facts_say_that_a_weight_is_transposed_only_if_it_is() -> None:
    plain, turned = LinearFacts(pattern="2:4", shape=(4, 8)), LinearFacts(pattern="2:4", shape=(4, 8), transposed=True)
    assert plain.model_dump(mode="json") == {"pattern": "2:4", "shape": [4, 8]}
    assert turned.model_dump(mode="json") == {"pattern": "2:4", "shape": [4, 8], "transposed": True}
    assert LinearFacts.model_validate(turned.model_dump(mode="json")) == turned
    assert (plain.stored_shape, turned.stored_shape) == ((4, 8), (8, 4))


def test_no_backend_takes_them_and_the_reason_is_told(gpt2: PreTrainedModel) -> None:
    masks, patterns = MaskStore(), {C_FC: NM(2, 4)}
    masks[C_FC] = torch.ones(48, 32, dtype=torch.bool)
    other = {name.removesuffix(".weight"): linear.form or "" for name, linear in held_otherwise(gpt2).items()}
    choice = swap_linears_(gpt2, Swapper(masks, patterns, other=other))[C_FC]
    assert choice.name == "dense"
    assert "is a Conv1D" in choice.refused["reference"]
    assert swap_linears_(gpt2, Swapper(masks, patterns, "dense", other))[C_FC].refused == {}
    with pytest.raises(BackendUnavailableError, match=rf"{C_FC}: backend reference: is a Conv1D"):
        swap_linears_(gpt2, Swapper(masks, patterns, "reference", other))
    assert isinstance(gpt2.get_submodule(C_FC), Conv1D)
