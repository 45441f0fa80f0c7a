"""AWQ's scales: the search against a slow one, and that folding them leaves what is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, GPT2Config

from compressllm.core.errors import RecipeError
from compressllm.core.pattern import NM
from compressllm.core.protocols import QUANTIZERS
from compressllm.core.registry import build
from compressllm.core.scheme import parse_scheme
from compressllm.core.stats import StatsAccumulator
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.loading import load_model
from compressllm.models.survey import survey
from compressllm.quantize import awq

SIZE = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


def uneven(folder: Path) -> Path:
    """The checkpoint with a few channels of each norm and of the values much larger than the rest."""
    from safetensors.torch import save_file

    from compressllm.models.tensorfile import TensorFile

    path = folder / "model.safetensors"
    file = TensorFile(path)
    tensors = {name: file.read(name) for name in file.specs}
    for name, tensor in tensors.items():
        if "layernorm" in name or ("v_proj" in name or "up_proj" in name):
            tensor[::7] *= 8
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "compressllm.json").unlink()  # whose hashes are no longer so
    return folder


def test_scales_better_what_is_computed_and_keep_the_masks(
    quantized: Callable[..., Any], sparse: Path, windows: Tensor
) -> None:
    sparse = uneven(sparse)
    plain, _ = quantized("plain", folder=sparse, method="rtn", scheme="int4-g32")
    made, run = quantized("scaled", folder=sparse, method={"awq-scale": {"grid": 10}}, scheme="int4-g32")
    assert all(row.sound for row in survey(made.checkpoint)[1])
    for name in plain.masks:
        assert torch.equal(made.masks[name], plain.masks[name])
    rows = {row["linear"]: row for row in run.records}
    assert len(rows) == 21
    into = {name.rpartition(".")[2]: row["scaled_into"].rpartition(".")[2] for name, row in rows.items()}
    assert into == {
        "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm", "o_proj": "v_proj",
        "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm", "down_proj": "up_proj",
    }  # fmt: skip
    assert any(row["alpha"] > 0 for row in rows.values())
    with torch.no_grad():
        exact = load_model(sparse, torch.float32)(windows).logits
        errors = [(one.live(torch.float32)(windows).logits - exact).norm() for one in (made, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_folding_alone_changes_nothing_but_by_rounding(
    quantized: Callable[..., Any], sparse: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = uneven(sparse)
    fold_, wrong = awq._fold_, []

    def watched(block: Any, *args: Any) -> Any:
        _, before = block.sample()
        made = fold_(block, *args)
        hidden, after = block.sample()
        wrong.append(float((after - before).norm() / (before - hidden).norm()))
        assert made is not None
        return made

    monkeypatch.setattr(awq, "_fold_", watched)
    quantized(folder=sparse, method="awq-scale", scheme="int4-g32")
    assert wrong
    assert max(wrong) < 0.01


def test_the_search_finds_what_trying_each_finds() -> None:
    torch.manual_seed(0)
    accumulator = StatsAccumulator(frozenset({"hessian"}))
    x = torch.randn(200, 64) * torch.logspace(-1, 1, 64)
    accumulator.add_(x)
    weight, scheme = torch.randn(8, 64), parse_scheme("int4-g32")
    keep = NM(2, 4).keep(weight.abs())
    weight *= keep
    found, alpha = build(QUANTIZERS, {"awq-scale": {"grid": 8}})._search(
        {"one": weight}, {"one": keep}, accumulator.finish("one"), torch.arange(64), scheme, lambda name: None
    )
    errors = {}
    for step in range(9):
        scale = x.square().mean(0).sqrt() ** (step / 8)
        scale /= (scale.max() * scale.min()).sqrt()
        rounded = torch.zeros_like(weight)
        for row in range(8):
            for start in (0, 32):
                part = (weight * scale)[row, start : start + 32]
                step_size = (part.abs().max() / 7).bfloat16().float()
                rounded[row, start : start + 32] = (part / step_size).round().clamp(-7, 7) * step_size
        errors[step / 8] = (x @ (rounded / scale - weight).T).square().sum().item()
        if step / 8 == alpha:
            assert torch.allclose(found, scale, rtol=1e-4)
    assert alpha == min(errors, key=errors.__getitem__) > 0


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_what_cannot_take_scales_says_why(
    quantized: Callable[..., Any], build_model: Any, tmp_path: Path, kind: str
) -> None:
    configs = {
        "gpt2": GPT2Config(**SIZE, n_embd=32, n_inner=48, n_layer=1, n_head=4, n_positions=64),
        "gemma": GemmaConfig(
            **SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        ),
    }  # fmt: skip
    build_model(configs[kind]).bfloat16().save_pretrained(tmp_path / kind)
    made, run = quantized(folder=tmp_path / kind, method="awq-scale", scheme="int4-g32")
    assert len(run.records) == len(all_linears(made.model))
    rows = {row["linear"].rpartition(".")[2]: row for row in run.records}
    if kind == "gpt2":
        assert all("unscaled" in row for row in run.records)
    else:  # its norms multiply by 1 + weight
        assert "computes something else" in rows["q_proj"]["unscaled"] or rows["q_proj"]["alpha"] == 0
        before, after = Checkpoint(tmp_path / kind), made.checkpoint
        norm = "model.layers.0.input_layernorm.weight"
        assert torch.equal(before.read(norm), after.read(norm))


def test_it_refuses_to_go_in_turn(quantized: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"awq-scale changes what linears are given .* use parallel"):
        quantized(method="awq-scale", order="sequential")
