import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressllm.core.errors import BackendUnavailableError, PatternError, RecipeError, UnsupportedModelError
from compressllm.core.masks import MaskStore, raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import BACKENDS
from compressllm.kernels.dense import Dense
from compressllm.kernels.linear import Choice, SparseLinear, choose_backend
from compressllm.kernels.reference import Reference
from compressllm.kernels.swapper import Swapper, swap_linears_
from compressllm.models.blocks import all_linears

PATTERN = NM(2, 4)


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(24, 10).bfloat16()
    made.weight.data[~PATTERN.keep(made.weight.float().abs())] = 0.0
    return made


@pytest.fixture
def keep(linear) -> torch.Tensor:
    return PATTERN.keep((linear.weight != 0).float())


def test_auto_is_dense_where_nothing_is_faster_and_says_why(linear):
    choice = choose_backend(linear.weight.float() / 3, PATTERN)
    assert choice.name == "dense"
    assert choice.refused["reference"] == "decodes the whole weight at every call, which is slower than dense"
    assert choice.refused["native"] == "its weights are torch.bfloat16 or quantised, not torch.float32 of more digits"


def test_a_backend_asked_for_by_name(linear):
    assert choose_backend(linear.weight, PATTERN, "reference") == Choice("reference")
    with pytest.raises(RecipeError, match="did you mean 'reference'"):
        choose_backend(linear.weight, PATTERN, "referense")


def test_a_refusal_gives_the_reason_and_a_way_out():
    weight = torch.ones(4, 8, dtype=torch.int8)
    with pytest.raises(BackendUnavailableError, match=r"backend dense: .*torch.int8.*backends that can: reference"):
        choose_backend(weight, PATTERN, "dense")
    with pytest.raises(
        BackendUnavailableError, match=r"no backend wants a torch.int8 weight on cpu: .*dense: .*reference"
    ):
        choose_backend(weight, PATTERN)


def test_auto_takes_the_highest_rank_that_does_not_refuse(linear, monkeypatch):
    class Fast(Dense):
        """Pretends."""

        rank = 50

        def refuses(self, weight, pattern, wanted=False):
            return None if pattern == PATTERN else "2:4 only"

    monkeypatch.setitem(BACKENDS._entries, "fast", Fast)
    assert choose_backend(linear.weight, PATTERN).name == "fast"
    other = choose_backend(linear.weight.float(), NM(4, 8))
    assert other.name == "dense"
    assert other.refused["fast"] == "2:4 only"


@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_stands_in_for_the_linear(linear, keep, backend, bias):
    if not bias:
        linear.bias = None
    sparse = SparseLinear.from_linear(linear, keep, PATTERN, backend)
    x = torch.randn(3, 5, 24, dtype=torch.bfloat16)
    assert torch.equal(sparse(x), linear(x))
    assert torch.equal(raw(sparse.weight), raw(linear.weight))
    assert (sparse.in_features, sparse.out_features) == (24, 10)
    assert sparse.bias is linear.bias
    assert f"pattern=2:4, backend={backend}" in repr(sparse)
    assert list(sparse.state_dict()) == list(linear.state_dict())
    assert torch.equal(sparse.state_dict()["weight"], linear.weight)


def test_reference_holds_only_what_is_kept(linear, keep):
    sparse = SparseLinear.from_linear(linear, keep, PATTERN, "reference")
    assert sum(buffer.nbytes for buffer in sparse.buffers()) == linear.weight.nbytes * 9 // 16
    assert [name for name, _ in sparse.named_parameters()] == ["bias"]


def test_moves_and_copies_like_any_module(linear, keep):
    sparse = SparseLinear.from_linear(linear, keep, PATTERN, "reference")
    wide = copy.deepcopy(sparse).float()
    assert wide.packed["bitmask"].dtype == torch.uint8  # a cast is for floats only
    assert torch.equal(wide.weight, linear.weight.float())
    assert sparse.weight.dtype == torch.bfloat16


def test_gradients_reach_what_came_before(linear, keep):
    sparse = SparseLinear.from_linear(linear.float(), keep, PATTERN, "reference")
    x = torch.randn(2, 24, requires_grad=True)
    sparse(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(2, 24))
    assert sparse.bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_reference_widens_8_bit_weights(dtype):
    weight = torch.randint(-8, 8, (6, 20)).float()
    keep = Unstructured(0.5).keep(weight.abs())
    weight[~keep] = 0
    sparse = SparseLinear(weight.to(dtype), keep, None, Unstructured(0.5), "reference")
    x = torch.randn(3, 20)
    assert torch.equal(sparse(x), x @ weight.T)


def test_a_mask_that_would_lose_weights_is_refused(linear, keep):
    keep[0] = False
    with pytest.raises(PatternError, match="12 weights are not zero where the mask prunes"):
        SparseLinear.from_linear(linear, keep, PATTERN)
    with pytest.raises(PatternError, match=r"mask has shape \(10, 12\), its weight \(10, 24\)"):
        SparseLinear.from_linear(linear, keep[:, :12], PATTERN)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    made = LlamaForCausalLM(config).eval()
    for linear in all_linears(made).values():
        linear.weight.data[~PATTERN.keep(linear.weight.abs())] = 0.0
    return made


@pytest.fixture
def masks(model) -> MaskStore:
    masks = MaskStore()
    for name, linear in all_linears(model).items():
        masks[name] = linear.weight != 0
    return masks


def test_swapping_keeps_the_model_what_it_is(model, masks, tmp_path):
    patterns = dict.fromkeys(masks, PATTERN)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[1, 2, 3]])
    logits = model(ids).logits
    report = swap_linears_(model, Swapper(masks, patterns, "reference"))
    assert report == dict.fromkeys(masks, Choice("reference"))
    assert isinstance(model.model.layers[1].mlp.down_proj, SparseLinear)
    assert isinstance(model.lm_head, nn.Linear)
    assert torch.equal(model(ids).logits, logits)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_auto_leaves_dense_linears_alone(model, masks):
    linears = all_linears(model)
    report = swap_linears_(model, Swapper(masks, dict.fromkeys(masks, PATTERN)))
    assert {choice.name for choice in report.values()} == {"dense"}
    assert all("reference" in choice.refused for choice in report.values())
    assert all_linears(model) == linears


def test_a_name_that_is_no_linear(model, masks):
    masks["model.layers.0.mlp"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp: has a mask but is a LlamaMLP"):
        swap_linears_(model, Swapper(masks, dict.fromkeys(masks, PATTERN), "reference"))
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_an_unavailable_backend_names_the_linear_and_swaps_nothing(model, masks, monkeypatch):
    name = "model.layers.1.mlp.up_proj"
    unwanted = model.get_submodule(name).weight
    monkeypatch.setattr(Reference, "refuses", lambda self, weight, *_, **__: "no" if weight is unwanted else None)
    with pytest.raises(BackendUnavailableError, match=f"{name}: backend reference: no"):
        swap_linears_(model, Swapper(masks, dict.fromkeys(masks, PATTERN), "reference"))
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_a_mask_that_does_not_fit_names_the_linear(model, masks):
    masks["model.layers.0.mlp.up_proj"] = torch.zeros(40, 32, dtype=torch.bool)
    with pytest.raises(PatternError, match=r"model\.layers\.0\.mlp\.up_proj: 640 weights"):
        swap_linears_(model, Swapper(masks, dict.fromkeys(masks, PATTERN), "reference"))
