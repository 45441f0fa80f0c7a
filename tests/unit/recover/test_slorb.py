"""SLoRB against its formula written out, and the policy on what becomes of a branch."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressllm.core.errors import FormatError, RecipeError, UnsupportedModelError
from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM
from compressllm.models.blocks import all_linears
from compressllm.recover.slorb import BranchedLinear, SLoRB

BLOCK = 4


@pytest.fixture
def pruned(llama: PreTrainedModel) -> tuple[PreTrainedModel, MaskStore, dict[str, Tensor]]:
    """The tiny Llama at 2:4 by magnitude, its masks, and the weights it had."""
    masks, dense = MaskStore(), {}
    for name, linear in all_linears(llama).items():
        dense[name] = linear.weight.clone()
        masks[name] = NM(2, 4).keep(linear.weight.abs())
        linear.weight.masked_fill_(~masks[name], 0.0)
    return llama, masks, dense


@pytest.mark.parametrize("projected", [True, False])
def test_sums_over_blocks_are_kept_and_formula(pruned: tuple, projected: bool) -> None:
    model, masks, dense = pruned
    SLoRB(BLOCK, projected, export="drop").attach_(model, masks, dense.__getitem__)
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    assert isinstance(module, BranchedLinear)
    out, columns = module.weight.shape
    total = module.weight.detach() + module.product()
    for row in range(0, out, 7):
        for start in range(0, columns, BLOCK):
            pruned_weights = dense[name][row, start : start + BLOCK][~masks[name][row, start : start + BLOCK]]
            assert module.slorb_s[row, start // BLOCK].item() == pytest.approx(float(pruned_weights.sum()) / BLOCK)
            was = float(dense[name][row, start : start + BLOCK].sum())
            assert float(total[row, start : start + BLOCK].sum()) == pytest.approx(was, abs=1e-6)
    x = torch.randn(3, 5, columns)
    sums = torch.stack([x[..., i : i + BLOCK].sum(-1) for i in range(0, columns, BLOCK)], -1)
    expected = x @ module.weight.T + sums @ module.slorb_s.T
    torch.testing.assert_close(module(x), expected)
    assert (module.slorb_x is not None) == projected


@pytest.mark.parametrize("projected", [True, False])
def test_trains_beside_the_weight_and_is_dropped(pruned: tuple, projected: bool, windows: Tensor) -> None:
    model, masks, dense = pruned
    names = set(model.state_dict())
    with torch.no_grad():
        without = model(input_ids=windows).logits
    slorb = SLoRB(BLOCK, projected, export="drop")
    model.requires_grad_(True)
    slorb.attach_(model, masks, dense.__getitem__)
    model(input_ids=windows).logits.square().mean().backward()
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    trained = [module.weight, module.slorb_s, *([module.slorb_x] if projected else [])]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    products = torch.cat([m.product().flatten() for m in model.modules() if isinstance(m, BranchedLinear)])
    weights = torch.cat([model.get_submodule(name).weight.detach().flatten() for name in masks])
    keep = torch.cat([masks[name].flatten() for name in masks])
    facts = slorb.detach_(model)
    assert facts["branch_to_weight_norm"] == pytest.approx(float(products.norm() / weights.norm()), rel=1e-5)
    on_pruned = products[~keep].square().sum() / products.square().sum()
    assert facts["branch_on_pruned"] == pytest.approx(float(on_pruned), rel=1e-5)
    assert set(model.state_dict()) == names
    assert all(type(model.get_submodule(name)) is nn.Linear for name in masks)
    with torch.no_grad():
        assert torch.equal(model(input_ids=windows).logits, without)
    with pytest.raises(FormatError, match="no branches"):
        slorb.detach_(model)


def test_forbidden_unless_they_are_to_be_dropped(pruned: tuple) -> None:
    model, masks, dense = pruned
    with pytest.raises(RecipeError, match=r"a branch is dense.*export: drop"):
        SLoRB().attach_(model, masks, dense.__getitem__)
    assert not any(isinstance(module, BranchedLinear) for module in model.modules())


def test_what_cannot_have_a_branch(pruned: tuple, gpt2: PreTrainedModel) -> None:
    model, masks, dense = pruned
    with pytest.raises(RecipeError, match="q_proj: 32 inputs are not a multiple of slorb's block of 5"):
        SLoRB(5, export="drop").attach_(model, masks, dense.__getitem__)
    name = "transformer.h.0.attn.c_attn"
    with pytest.raises(UnsupportedModelError, match=f"{name}: is no nn.Linear"):
        SLoRB(4, export="drop").attach_(gpt2, {name: torch.ones(96, 32, dtype=torch.bool)}, dense.__getitem__)
