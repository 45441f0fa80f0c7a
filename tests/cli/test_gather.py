"""``compressllm prune --gather`` and what follows it, on the trained tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressllm.core.detect import pattern_of
from compressllm.core.gathered import Gathered
from compressllm.core.pattern import NM
from compressllm.core.quantized import round_to_nearest
from compressllm.core.scheme import parse_scheme
from compressllm.export.hf import PackedConfig
from compressllm.export.sizes import exported_sizes
from compressllm.kernels.linear import SparseLinear
from compressllm.models.checkpoint import Checkpoint

FAST = ("--samples", 4, "--seqlen", 64)


@pytest.fixture
def pruned(cli: Callable, tiny: str, text: str, tmp_path: Path) -> Path:
    """A run that pruned to 2:4 in orders of inputs."""
    done = cli("prune", tiny, tmp_path / "run", "--data", text, *FAST, "--gather", "{rounds: 8}")
    assert done.code == 0, done.err
    return tmp_path / "run"


def perplexity(cli: Callable, model: object, text: str, *more: object) -> float:
    done = cli("eval", model, "--data", text, "--seqlen", 64, "--windows", 8, *more, "--json")
    assert done.code == 0, done.err
    return float(done.json["perplexity"])


def test_gathered_beats_the_order_that_came(cli: Callable, tiny: str, text: str, pruned: Path, tmp_path: Path) -> None:
    assert cli("prune", tiny, tmp_path / "plain", "--data", text, *FAST).code == 0
    assert perplexity(cli, pruned, text) < perplexity(cli, tmp_path / "plain", text)
    manifest = json.loads((pruned / "manifest.json").read_text())
    assert manifest["stages"][0]["config"]["gather"]["rounds"] == 8
    assert "order" not in manifest["stages"][0]["linears"][0]


def test_verifies_in_its_order_and_packs_and_runs(cli: Callable, text: str, pruned: Path, tmp_path: Path) -> None:
    assert cli("verify", pruned, "--pattern", "2:4").code == 0
    assert cli("verify", pruned, "--pattern", "1:4").code == 1
    shown = cli("inspect", pruned, "--json").json
    assert {row["pattern"] for row in shown["linears"]} == {"2:4 gathered"}
    assert cli("export", pruned, tmp_path / "packed", "--format", "packed").code == 0
    assert cli("verify", tmp_path / "packed", "--pattern", "2:4").code == 0
    dense = perplexity(cli, pruned, text, "--backend", "dense")
    assert perplexity(cli, tmp_path / "packed", text, "--backend", "dense") == dense
    assert perplexity(cli, tmp_path / "packed", text, "--backend", "reference") == pytest.approx(dense, rel=1e-2)
    assert cli("export", tmp_path / "packed", tmp_path / "again", "--format", "dense").code == 0
    assert Checkpoint(tmp_path / "again").facts.patterns == Checkpoint(pruned / "model").facts.patterns


def test_transformers_loads_it_onto_the_kernels_of_its_pattern(cli: Callable, pruned: Path, tmp_path: Path) -> None:
    assert cli("export", pruned, tmp_path / "packed", "--format", "packed").code == 0
    ids = torch.arange(20).unsqueeze(0)
    dense = AutoModelForCausalLM.from_pretrained(pruned / "model")
    config = PackedConfig(backend="reference")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="packed", quantization_config=config)
    linear = packed.model.layers[0].mlp.down_proj
    assert isinstance(linear, SparseLinear)
    assert isinstance(linear.pattern, Gathered)
    assert linear.pattern.base == NM(2, 4)
    assert torch.equal(linear.weight, dense.model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=3e-2, atol=3e-2)
    (tmp_path / "packed" / "compressllm.json").unlink()  # as where only weights and config were fetched
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="packed", quantization_config=config)
    linear = packed.model.layers[0].mlp.down_proj
    assert linear.pattern == pattern_of(linear.weight != 0)
    torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=3e-2, atol=3e-2)


def test_recovers_and_quantises_with_its_orders(
    cli: Callable, tiny: str, text: str, pruned: Path, tmp_path: Path
) -> None:
    train = ("--data", text, "--seqlen", 32, "--max-tokens", 512, "--batch-tokens", 256, "--losses", "kl=1.0")
    for masking in ("fixed", "ast"):
        out = tmp_path / masking
        done = cli("recover", pruned, out, "--teacher", tiny, *train, "--masking", masking, "--pattern", "2:4")
        assert done.code == 0, done.err
        assert cli("verify", out, "--pattern", "2:4").code == 0
        assert Checkpoint(out / "model").facts.patterns == Checkpoint(pruned / "model").facts.patterns
    done = cli("recover", pruned, tmp_path / "no", "--teacher", tiny, *train, "--pattern", "1:4")
    assert done.code == 2
    assert "its mask breaks 1:4 in" in done.err
    for scheme in ("int8", "int4-g32"):
        done = cli("quantize", pruned, tmp_path / scheme, "--scheme", scheme, "--data", text, *FAST)
        assert done.code == 0, done.err
        assert cli("verify", tmp_path / scheme, "--pattern", "2:4").code == 0
        dense, packed = (perplexity(cli, tmp_path / scheme, text, "--backend", b) for b in ("dense", "reference"))
        assert packed == pytest.approx(dense, rel=1e-2)
    ids, checkpoint = torch.arange(20).unsqueeze(0), Checkpoint(tmp_path / "int4-g32" / "model")
    assert "model.layers.0.mlp.up_proj.order" in checkpoint.stored_specs
    orders = sum(spec.bytes for name, spec in checkpoint.stored_specs.items() if name.endswith(".order"))
    parts = sum(spec.bytes for name, spec in checkpoint.stored_specs.items() if "_proj." in name)
    assert 0 < orders < parts == exported_sizes(checkpoint).stored
    config = PackedConfig(backend="reference")
    folder = tmp_path / "int4-g32" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, variant="packed", quantization_config=config)
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, SparseLinear)
    assert linear.order is not None
    weight = checkpoint.quantized("model.layers.0.mlp.up_proj").dequantize(torch.float32)
    torch.testing.assert_close(linear.weight.float(), weight, rtol=1e-2, atol=1e-3)
    assert model(ids).logits.isfinite().all()
    done = cli("export", tmp_path / "int4-g32", tmp_path / "stock", "--format", "compressed-tensors")
    assert done.code == 2
    assert "its groups lie in an order of inputs of its own" in done.err
    assert not (tmp_path / "stock").exists()


def test_training_with_rounded_weights_rounds_as_quantising_does(
    cli: Callable, tiny: str, text: str, pruned: Path, tmp_path: Path
) -> None:
    train = ("--data", text, "--seqlen", 32, "--max-tokens", 256, "--batch-tokens", 128, "--losses", "kl=1.0")
    done = cli("recover", pruned, tmp_path / "out", "--teacher", tiny, *train, "--quantize", "int4-g32")
    assert done.code == 0, done.err
    assert cli("quantize", tmp_path / "out", tmp_path / "codes", "--scheme", "int4-g32", "--method", "rtn").code == 0
    before, after = Checkpoint(tmp_path / "out" / "model"), Checkpoint(tmp_path / "codes" / "model")
    name = "model.layers.1.mlp.down_proj"
    order = before.facts.patterns[name].places
    weight, keep = before.read(f"{name}.weight"), before.mask(name)
    made = round_to_nearest(weight, keep, parse_scheme("int4-g32"), order=order)
    assert torch.equal(after.read(f"{name}.weight"), made.dequantize())


def test_what_makes_no_sense_is_one_line(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    done = cli("prune", tiny, tmp_path / "a", "--pattern", "0.5", "--gather", "true")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "0.5 has no groups that an order of inputs matters to; give N:M as in 2:4" in done.err
    done = cli("prune", tiny, tmp_path / "a", "--data", text, *FAST, "--gather", "{only: ['*.k_prj']}")
    assert done.code == 2
    assert "gather.only: '*.k_prj' matches no linear to prune" in done.err
    assert not (tmp_path / "a").exists()
