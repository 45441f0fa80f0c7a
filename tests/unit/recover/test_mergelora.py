"""A plain LoRA merged under the masks, against the merge written out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compressllm.core.errors import FormatError
from compressllm.export.writer import export_model
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.survey import survey
from compressllm.recover.mergelora import MaskedMerge

RANK, ALPHA = 2, 6


def write_lora(folder: Path, shapes: dict[str, tuple[int, int]], **settings: object) -> dict[str, torch.Tensor]:
    """A LoRA as PEFT writes it; returns (out, in) B A of each linear."""
    torch.manual_seed(7)
    tensors = {}
    for name, (out, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **settings})
    )
    return {
        name: tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        for name in shapes
    }


LLAMA = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.2.mlp.up_proj": (48, 32), "lm_head": (64, 32)}
GPT2 = {"transformer.h.0.attn.c_attn": (96, 32)}


@pytest.mark.parametrize(("family", "shapes"), [("llama", LLAMA), ("gpt2", GPT2)])
@pytest.mark.parametrize("rslora", [False, True])
def test_merges_what_falls_on_kept_weights(
    family: str, shapes: dict, rslora: bool, member: Callable, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    student = member("student", request.getfixturevalue(family), 0)
    products = write_lora(tmp_path / "lora", shapes, use_rslora=rslora)
    scale = ALPHA / RANK**0.5 if rslora else ALPHA / RANK
    merge = MaskedMerge(student, tmp_path / "lora")
    facts = export_model(merge, tmp_path / "out", "dense")
    before, after = load_file(student / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    lost = total = 0.0
    for name, value in before.items():
        linear = name.removesuffix(".weight")
        if linear not in products:
            assert torch.equal(after[name], value), name
            continue
        update, keep = scale * products[linear], Checkpoint(student).mask(linear)
        keep = torch.ones_like(update, dtype=torch.bool) if keep is None else keep
        turned = (update * keep).T if family == "gpt2" else update * keep
        torch.testing.assert_close(after[name], value + turned)
        lost, total = lost + float((update * ~keep).square().sum()), total + float(update.square().sum())
    _, rows = survey(Checkpoint(tmp_path / "out"))
    assert all(row.sound and row.sparsity == 0.5 for row in rows)
    assert facts.masks_sha256 == Checkpoint(student).masks().sha256()
    assert facts.source["merged"]["dropped"] == pytest.approx(lost / total, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "shapes", "says"),
    [
        ({"peft_type": "IA3"}, LLAMA, "of kind IA3"),
        ({"use_dora": True}, LLAMA, "with use_dora"),
        ({"modules_to_save": ["lm_head"]}, LLAMA, "with modules_to_save"),
        ({}, {"model.layers.7.mlp.up_proj": (48, 32)}, "layers.7.* is no LoRA of a linear that"),
        ({}, {"model.layers.0.mlp.up_proj": (40, 32)}, r"lora_B.weight has not shape \(48, 2\)"),
        ({}, {}, "holds no LoRA"),
    ],
)
def test_adapters_that_cannot_be_merged(
    settings: dict, shapes: dict, says: str, member: Callable, llama: PreTrainedModel, tmp_path: Path
) -> None:
    student = member("student", llama, 0)
    write_lora(tmp_path / "lora", shapes, **settings)
    with pytest.raises(FormatError, match=says):
        MaskedMerge(student, tmp_path / "lora")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", LLAMA)
    with pytest.raises(FormatError, match=r"holds an adapter of PEFT, not a model.*masklora"):
        Checkpoint(tmp_path / "lora")
