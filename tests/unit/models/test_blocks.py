from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GptOssConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from compressllm.core.errors import UnsupportedModelError
from compressllm.models.blocks import all_linears, find_blocks, find_linears
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import skeleton

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def experts(count: int) -> list[str]:
    return [f"mlp.experts.{one}.{part}" for one in range(count) for part in ("gate_proj", "up_proj", "down_proj")]


EXPECTED = {
    "LlamaForCausalLM": ("model.layers", GATED),
    "Qwen3ForCausalLM": ("model.layers", GATED),
    "MistralForCausalLM": ("model.layers", GATED),
    "Gemma3ForCausalLM": ("model.layers", GATED),
    "PhiForCausalLM": ("model.layers", [*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"]),
    "OPTForCausalLM": (
        "model.decoder.layers",
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    ),
    "GPTNeoXForCausalLM": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "MixtralForCausalLM": ("model.layers", [*ATTENTION, *experts(4)]),
    "Qwen3MoeForCausalLM": ("model.layers", [*ATTENTION, *experts(6)]),
    "Qwen2MoeForCausalLM": (
        "model.layers",
        [*ATTENTION, *experts(5), *(f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj"))],
    ),
    "GPT2LMHeadModel": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
}


def test_blocks_and_linears_of_every_architecture(decoder: PreTrainedModel) -> None:
    prefix, linears = EXPECTED[type(decoder).__name__]
    blocks = find_blocks(decoder)
    assert blocks.prefix == prefix
    assert [decoder.get_submodule(blocks.name(index)) for index in range(3)] == list(blocks.modules)
    found = all_linears(decoder)
    if isinstance(decoder, Qwen2MoeForCausalLM):  # its first block has no experts
        assert list(found)[:7] == [f"{prefix}.0.{name}" for name in GATED]
        found = {name: linear for name, linear in found.items() if ".layers.0." not in name}
    first = 3 - len(found) // len(linears)  # 0, but for it
    assert list(found) == [f"{prefix}.{index}.{name}" for index in range(first, 3) for name in linears]
    for name, linear in found.items():
        assert decoder.get_parameter(linear.parameter) is getattr(linear.module, linear.leaf)
        assert linear.name == name
        assert linear.expert is not None or decoder.get_submodule(name) is linear.module


def test_a_skeleton_has_the_same_linears(llama: PreTrainedModel, tmp_path) -> None:
    llama.save_pretrained(tmp_path)
    assert list(all_linears(skeleton(Checkpoint(tmp_path)))) == list(all_linears(llama))


def gptoss(build: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return build(GptOssConfig(**size, **heads, num_local_experts=4, num_experts_per_tok=2))


def t5(build: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bart(build: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    size = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, encoder_layers=3, decoder_layers=2, **size, **heads))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gptoss, r"model\.layers\.0\.mlp\.experts\.gate_up_proj: is a tensor of three dimensions of a kind"),
        (t5, "T5ForConditionalGeneration: is an encoder-decoder; only decoder-only"),
        (bart, "BartForConditionalGeneration: is an encoder-decoder; only decoder-only"),
    ],
    ids=["gptoss", "t5", "bart"],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(
    make: Callable[..., PreTrainedModel], message: str, build_model: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        all_linears(make(build_model))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("make", [gptoss, t5, bart], ids=["gptoss", "t5", "bart"])
def test_it_is_refused_from_disk_too(make, build_model: Callable[..., PreTrainedModel], tmp_path) -> None:
    make(build_model).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"experts|encoder-decoder"):
        all_linears(skeleton(Checkpoint(tmp_path)))


def test_a_model_whose_blocks_are_not_found_is_refused(llama: PreTrainedModel) -> None:
    llama.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="needs one list of 5 decoder blocks, found none"):
        find_blocks(llama)
    llama.config.num_hidden_layers = 3
    llama.model.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    with pytest.raises(UnsupportedModelError, match=r"found model\.layers, model\.more"):
        find_blocks(llama)


def test_lists_of_the_same_length_inside_blocks_or_without_matrices_do_not_confuse(llama: PreTrainedModel) -> None:
    llama.model.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
    llama.model.layers[0].experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert find_blocks(llama).prefix == "model.layers"


def test_routers_and_gates_with_one_output_are_left_alone() -> None:
    block = nn.ModuleDict(
        {
            "up_proj": nn.Linear(4, 8),
            "gate_proj": nn.Linear(4, 8),
            "gate": nn.Linear(4, 8),
            "router": nn.ModuleDict({"classifier": nn.Linear(4, 8)}),
            "shared_expert_gate": nn.Linear(4, 1),
        }
    )
    assert list(find_linears(block, "b")) == ["b.up_proj", "b.gate_proj"]


def test_a_block_without_linears_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"b\.0: holds no linear to prune"):
        find_linears(nn.LayerNorm(4), "b.0")


def test_tied_linears_are_refused_but_tied_embeddings_are_not(llama: PreTrainedModel) -> None:
    llama.lm_head.weight = llama.model.embed_tokens.weight
    assert len(all_linears(llama)) == 21
    llama.model.layers[2].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    message = r"layers\.2\.mlp\.up_proj: shares its weight with model\.layers\.0\.mlp\.up_proj; tied"
    with pytest.raises(UnsupportedModelError, match=message):
        all_linears(llama)


def test_linears_that_a_model_class_ties_are_refused_on_the_meta_device_too(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    tied = {"model.layers.2.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", tied)
    llama.config.tie_word_embeddings = True
    model = LlamaForCausalLM(llama.config).to(torch.float32)
    with pytest.raises(UnsupportedModelError, match="tied linears cannot be pruned"):
        all_linears(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="tied linears cannot be pruned"):
        all_linears(skeleton(Checkpoint(tmp_path)))


@pytest.mark.parametrize(
    ("decoder", "parameter"),
    [("gpt2", "transformer.h.{}.mlp.c_fc.weight"), ("mixtral", "model.layers.{}.mlp.experts.gate_up_proj")],
    indirect=["decoder"],
)
def test_tied_linears_of_other_forms_are_refused_too(decoder: PreTrainedModel, parameter: str) -> None:
    first, second = (parameter.format(index) for index in (0, 2))
    owner, _, leaf = second.rpartition(".")
    setattr(decoder.get_submodule(owner), leaf, decoder.get_parameter(first))
    tied, source = second.removesuffix(".weight"), first.removesuffix(".weight")
    with pytest.raises(UnsupportedModelError, match=rf"^{tied}: shares its weight with {source}; tied linears"):
        all_linears(decoder)
