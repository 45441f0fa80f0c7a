"""What every adapter promises, over the registry: it changes nothing at first, and what is merged keeps the zeros."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from compressllm.core.errors import CompressError, FormatError, RecipeError
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM
from compressllm.core.protocols import ADAPTERS
from compressllm.core.registry import build
from compressllm.models.blocks import all_linears
from compressllm.recover.adapters.trainable import (
    load_trainable_,
    save_trainable,
    trainable,
    trainable_facts,
)

NAMES = ["bias-norm", "masklora", "scalelora", "spp"]
RANKED = {name: {name: {"rank": 4}} for name in NAMES if name != "bias-norm"} | {"bias-norm": "bias-norm"}


def masked(model: PreTrainedModel) -> MaskStore:
    """2:4 masks by magnitude, applied to the model. Changes it in place."""
    masks = MaskStore()
    for name, linear in all_linears(model).items():
        masks[name] = NM(2, 4).keep(linear.weight.abs())
        linear.weight.masked_fill_(~masks[name], 0.0)
    return masks


def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=windows).logits
        return out


def train_(model: PreTrainedModel, windows: Tensor, steps: int = 4) -> None:
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(input_ids=windows).logits
        cross_entropy(out[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()


def test_the_registry_holds_them() -> None:
    assert ADAPTERS.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_keeps_the_zeros_and_computes_the_same(
    name: str, family: str, request: pytest.FixtureRequest, windows: Tensor
) -> None:
    model: PreTrainedModel = request.getfixturevalue(family)
    masks = masked(model)
    modules = {path: type(module) for path, module in model.named_modules()}
    before, start = copy.deepcopy(model.state_dict()), logits(model, windows)
    adapter = build(ADAPTERS, RANKED[name])

    adapter.attach_(model, masks)
    torch.testing.assert_close(logits(model, windows), start, rtol=1e-5, atol=1e-6)
    train_(model, windows)
    trained = logits(model, windows)
    assert (trained - start).abs().max() > 1e-2
    adapter.merge_(model)

    assert {path: type(module) for path, module in model.named_modules()} == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert (logits(model, windows) - trained).abs().max() <= 1e-5 * trained.abs().max()
    for linear, held in all_linears(model).items():
        keep, weight = masks[linear], held.weight
        assert not weight[~keep].any()
        assert not torch.signbit(weight[~keep]).any(), "a pruned weight is -0.0"
        assert torch.equal(weight != 0, keep)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    vectors = {key for key, value in before.items() if value.dim() == 1}
    weights = set() if name == "bias-norm" else {f"{linear}.weight" for linear in masks}
    assert changed == vectors | weights


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bias-norm"])
def test_same_seed_same_start(name: str, llama: PreTrainedModel, windows: Tensor) -> None:
    masks = masked(llama)
    copies = [copy.deepcopy(llama) for _ in range(3)]
    for model, seed in zip(copies, (0, 0, 1), strict=True):
        build(ADAPTERS, {name: {"rank": 4}}, {"seed": seed}).attach_(model, masks)
    one, same, other = (trainable(model) for model in copies)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bias-norm"])
def test_without_norms_only_its_own_parameters_are_trained(name: str, llama: PreTrainedModel) -> None:
    masks, known = masked(llama), {key for key, _ in llama.named_parameters()}
    build(ADAPTERS, {name: {"rank": 4, "norms": False}}).attach_(llama, masks)
    assert trainable(llama).keys().isdisjoint(known)
    assert len(trainable(llama)) == 2 * len(masks)


@pytest.mark.parametrize("name", NAMES)
def test_trained_parameters_are_saved_by_name(name: str, llama: PreTrainedModel, windows: Tensor, tmp_path) -> None:
    masks = masked(llama)
    other = copy.deepcopy(llama)
    for model in (llama, other):
        build(ADAPTERS, RANKED[name]).attach_(model, masks)
    train_(llama, windows)
    save_trainable(llama, tmp_path / "adapter.safetensors")
    load_trainable_(other, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(llama, windows), logits(other, windows))
    facts = trainable_facts(llama)
    assert facts["trainable"] == sum(p.numel() for p in llama.parameters() if p.requires_grad)
    assert 0 < facts["trainable_share"] < 1


def test_parameters_of_another_adapter_are_refused(llama: PreTrainedModel, tmp_path) -> None:
    masks = masked(llama)
    models = {rank: copy.deepcopy(llama) for rank in (2, 4)}
    for rank, model in models.items():
        build(ADAPTERS, {"masklora": {"rank": rank}}).attach_(model, masks)
    save_trainable(models[2], tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match=r"lora_a has shape \(2, 32\), the model's \(4, 32\)"):
        load_trainable_(models[4], tmp_path / "two.safetensors")
    build(ADAPTERS, "bias-norm").attach_(llama, masks)
    with pytest.raises(FormatError, match="is in the file only"):
        load_trainable_(llama, tmp_path / "two.safetensors")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("masklora", {"rank": 0}, "rank 0"),
        ("spp", {"rank": 5}, r"q_proj: 32 outputs are not a multiple of rank 5"),
        ("scalelora", {"rank": -1}, "rank -1"),
    ],
)
def test_options_that_will_not_do(name: str, options: dict, says: str, llama: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match=says):
        build(ADAPTERS, {name: options}).attach_(llama, masked(llama))
    assert not any(key.endswith("spp_p") for key, _ in llama.named_parameters())


def test_models_that_will_not_do(llama: PreTrainedModel, build_model: Callable[..., PreTrainedModel]) -> None:
    adapter = build(ADAPTERS, "masklora")
    with pytest.raises(RecipeError, match="no masked linear"):
        adapter.attach_(llama, {})
    masks = masked(llama)
    first = next(iter(masks))
    with pytest.raises(FormatError, match=f"{first}: its mask has shape"):
        adapter.attach_(llama, {first: masks[first][:, :4]})
    llama.get_submodule(first).weight.data[:] = 1.0
    with pytest.raises(FormatError, match=f"{first}: 512 weights are not zero where its mask prunes"):
        adapter.attach_(llama, masks)
    with pytest.raises(CompressError, match=r"nowhere.up_proj: is held together with others"):
        adapter.attach_(llama, {"nowhere.up_proj": masks[first]})
    assert all(not key.endswith("lora_a") for key, _ in llama.named_parameters())
