from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressllm.core.masks import MaskStore
from compressllm.core.pattern import NM
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import write_masks


@pytest.fixture
def sparse_model() -> LlamaForCausalLM:
    """A 2:4 Llama of two blocks in bfloat16, with a kept -0.0, a kept zero and an all-zero row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for linear in all_linears(model).values():
        linear.weight.data[~NM(2, 4).keep(linear.weight.float().abs())] = 0.0
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[0] = 0.0
    weight[1, :4] = torch.tensor([-0.0, 1.0, 0.0, 0.0])
    return model


@pytest.fixture
def sparse_folder(sparse_model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The model as any library would save it: zeros, but no masks."""
    sparse_model.save_pretrained(tmp_path / "zeros")
    return tmp_path / "zeros"


@pytest.fixture
def masked_folder(sparse_folder: Path, sparse_model: LlamaForCausalLM) -> Path:
    """The same with stored masks, which keep a -0.0 and some zeros."""
    masks = MaskStore()
    for name, linear in all_linears(sparse_model).items():
        keep = NM(2, 4).keep((linear.weight.float() != 0).float())
        masks[name] = keep
    keep = masks["model.layers.0.mlp.up_proj"]
    keep[1, :4] = torch.tensor([True, True, False, False])
    masks["model.layers.0.mlp.up_proj"] = keep
    write_masks(sparse_folder / "masks.safetensors", masks)
    return sparse_folder
