"""Checkpoints of mixtures: one tensor an expert on disk, one of all in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from compressllm.core.errors import FormatError, UnsupportedModelError
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.experts import expert_weight
from compressllm.models.linears import linears_of
from compressllm.models.loading import load_model, skeleton
from compressllm.models.shards import ShardWriter
from compressllm.models.tensornames import tensor_names
from compressllm.models.weights import StreamedWeights

BLOCK = "model.layers.1"
GATE, UP, DOWN = (f"{BLOCK}.mlp.experts.2.{part}_proj" for part in ("gate", "up", "down"))
STORED = {GATE: "w1", UP: "w3", DOWN: "w2"}


@pytest.fixture
def mixtral(build_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Two blocks of twelve experts: in the order of text, the tenth comes after the first."""
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return build_model(MixtralConfig(**size, **heads, num_local_experts=12, num_experts_per_tok=2))


@pytest.fixture
def folder(mixtral: PreTrainedModel, tmp_path: Path) -> Path:
    """It as transformers saves it, float32."""
    mixtral.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_an_experts_weight_is_its_part_of_the_fused_one(mixtral: PreTrainedModel) -> None:
    module, linears = mixtral.model.layers[1].mlp.experts, all_linears(mixtral)
    gate, up = module.gate_up_proj[2].chunk(2)
    for name, weight in ((GATE, gate), (UP, up), (DOWN, module.down_proj[2])):
        assert torch.equal(linears[name].weight, weight)
        assert linears[name].weight.data_ptr() == weight.data_ptr()
        assert linears[name].weight.is_contiguous()
        assert "expert" in str(linears[name].form)


@pytest.mark.parametrize("flag", ["is_transposed", "has_bias", "has_gate", "is_concatenated", "has_post_expert_norm"])
def test_experts_of_another_form_are_not_taken_for_these(mixtral: PreTrainedModel, flag: str) -> None:
    module = mixtral.model.layers[1].mlp.experts
    assert len(linears_of(module, "experts")) == 36
    setattr(module, flag, not getattr(module, flag))
    assert linears_of(module, "experts") == []
    with pytest.raises(UnsupportedModelError, match=rf"{BLOCK}\.mlp\.experts\.gate_up_proj: is a tensor of three"):
        all_linears(mixtral)


def test_names_on_disk_are_those_of_transformers(mixtral: PreTrainedModel, folder: Path) -> None:
    names = tensor_names(mixtral, Checkpoint(folder))
    assert set(names.values()) == Checkpoint(folder).specs.keys()
    for name, part in STORED.items():
        stored = f"{BLOCK}.block_sparse_moe.experts.2.{part}.weight"
        assert names[f"{name}.weight"] == stored
        assert torch.equal(Checkpoint(folder).read(stored), all_linears(mixtral)[name].weight)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_whole_model_is_loaded_as_transformers_loads_it(folder: Path, dtype: torch.dtype | None) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32).state_dict()
    found = load_model(folder, dtype).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_checkpoint_of_the_base_model(mixtral: PreTrainedModel, folder: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(folder, strip)
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in mixtral.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_is_streamed_expert_by_expert(
    mixtral: PreTrainedModel, folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    source, model = Checkpoint(folder), skeleton(Checkpoint(folder))
    out = ShardWriter(tmp_path, source.specs)
    weights = StreamedWeights(model, source, out, set(), dtype, torch.device("cpu"))
    weights.load_(BLOCK)
    experts = model.model.layers[1].mlp.experts
    assert model.model.layers[0].mlp.experts.down_proj.is_meta
    assert torch.equal(experts.gate_up_proj, mixtral.model.layers[1].mlp.experts.gate_up_proj.to(dtype))
    assert torch.equal(weights.read(f"{UP}.weight"), all_linears(mixtral)[UP].weight)  # the stored bits
    changed = all_linears(mixtral)[UP].weight * 0.7
    weights.replace_(f"{UP}.weight", changed)
    expected = mixtral.model.layers[1].mlp.experts.gate_up_proj.detach().clone()
    expected[2, 8:] = changed
    assert torch.equal(experts.gate_up_proj, expected.to(dtype))
    assert torch.equal(weights.read(f"{UP}.weight"), changed)
    weights.finish_(BLOCK)
    weights.release_(BLOCK)
    assert all(parameter.is_meta for parameter in model.parameters())
    for name in source.specs:
        if name.startswith(BLOCK):
            replaced = name == f"{BLOCK}.block_sparse_moe.experts.2.w3.weight"
            assert torch.equal(out.read(name), changed if replaced else source.read(name)), name


def test_experts_in_the_stored_dtype_are_in_memory_once(folder: Path, tmp_path: Path) -> None:
    model = skeleton(Checkpoint(folder))
    out = ShardWriter(tmp_path, Checkpoint(folder).specs)
    weights = StreamedWeights(model, Checkpoint(folder), out, set(), torch.float32, torch.device("cpu"))
    weights.load_(BLOCK)
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    assert weights.read(f"{UP}.weight").data_ptr() == fused[2, 8:].data_ptr()


def test_a_missing_expert_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{BLOCK}.block_sparse_moe.experts.11.w3.weight"))
    with pytest.raises(FormatError, match=rf"lacks tensor {BLOCK}\.mlp\.experts\.11\.up_proj\.weight, which Mixtral"):
        skeleton(Checkpoint(folder))


def test_an_expert_of_another_shape_is_named(folder: Path) -> None:
    name = f"{BLOCK}.block_sparse_moe.experts.3.w2.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(16, 9)}))
    with pytest.raises(
        FormatError, match=r"experts\.3\.w2\.weight has shape \(16, 9\), config\.json implies \(16, 8\)"
    ):
        skeleton(Checkpoint(folder))


def test_experts_stored_in_one_tensor_are_refused(mixtral: PreTrainedModel, tmp_path: Path) -> None:
    mixtral.save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(UnsupportedModelError, match=r"stores all experts in one tensor, model\.layers\.0\."):
        skeleton(Checkpoint(tmp_path))


def test_other_conversions_are_not_taken_for_these() -> None:
    stored, loaded, source = "b.experts.3.up_proj.weight", "b.experts.gate_up_proj", "experts.*.up_proj.weight"
    pair = ["experts.*.gate_proj.weight", source]
    steps = [MergeModulelist(dim=0), Concatenate(dim=1)]
    right = WeightConverter(list(pair), "experts.gate_up_proj", operations=steps)
    assert expert_weight(stored, loaded, source, right) == "b.experts.3.up_proj.weight"
    for patterns, operations in [
        (pair, [*steps, Transpose(1, 2)]),
        (pair, [MergeModulelist(dim=0), Concatenate(dim=2)]),
        ([source], steps),
    ]:
        wrong = WeightConverter(list(patterns), "experts.gate_up_proj", operations=operations)
        assert expert_weight(stored, loaded, source, wrong) is None
    assert expert_weight("b.up_proj.weight", loaded, source, right) is None
    assert expert_weight(stored, "b.experts.gate_proj", source, right) is None
