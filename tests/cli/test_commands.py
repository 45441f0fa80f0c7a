"""Each command on the trained tiny model, as a user would run it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import compressllm
from compressllm.core.protocols import REGISTRIES
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.shards import file_sha256

FAST = ("--samples", 8, "--seqlen", 128)
EVAL = ("--windows", 8, "--seqlen", 128)


@pytest.fixture
def run_folder(cli: Callable, tiny: str, text: str, tmp_path: Path) -> Path:
    """A run of Wanda at 2:4."""
    assert cli("prune", tiny, tmp_path / "run", "--data", text, *FAST).code == 0
    return tmp_path / "run"


def test_prune_leaves_a_model_a_recipe_and_a_manifest(run_folder: Path) -> None:
    manifest = json.loads((run_folder / "manifest.json").read_text())
    (stage,) = manifest["stages"]
    assert manifest["finished"]
    assert stage["metrics"]["sparsity"] == pytest.approx(0.5, abs=1e-9)
    assert stage["metrics"]["calibration"]["windows"] == 8
    assert len(stage["linears"]) == stage["metrics"]["linears"]
    assert stage["peak_memory_bytes"] > 0
    for name, digest in stage["sha256"].items():
        assert file_sha256(run_folder / "model" / name) == digest
    assert (run_folder / "recipe.yaml").read_text().startswith("model: ")
    assert not list(run_folder.glob("**/*.partial"))
    assert not list(run_folder.glob("**/progress.json"))


def test_the_pruned_model_opens_in_stock_transformers(run_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert (weight.view(weight.shape[0], -1, 4) != 0).sum(-1).max() == 2


def test_packed_export_loads_and_is_bit_identical(cli: Callable, run_folder: Path, tmp_path: Path) -> None:
    done = cli("export", run_folder, tmp_path / "packed", "--format", "packed", "--json")
    assert done.code == 0
    itemsize = next(iter(Checkpoint(run_folder / "model").specs.values())).dtype.itemsize
    assert done.json["ratio"] == pytest.approx(0.5 + 1 / (8 * itemsize))
    assert compressllm.__version__ == done.json["written_by"]
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="packed")
    dense = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert packed.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, packed.state_dict()[name]), name
    back = cli("export", tmp_path / "packed", tmp_path / "dense", "--format", "dense")
    assert back.code == 0
    assert file_sha256(tmp_path / "dense" / "model.safetensors") == file_sha256(
        run_folder / "model" / "model.safetensors"
    )


def test_eval_is_the_same_on_every_form_and_backend(cli: Callable, run_folder: Path, text: str, tmp_path: Path) -> None:
    assert cli("export", run_folder, tmp_path / "packed").code == 0
    runs = [
        cli("eval", model, "--data", text, *EVAL, "--backend", backend, "--json")
        for model, backend in ((run_folder, "auto"), (tmp_path / "packed", "auto"), (tmp_path / "packed", "reference"))
    ]
    assert {run.code for run in runs} == {0}
    assert runs[0].json["perplexity"] == runs[1].json["perplexity"]
    assert runs[2].json["perplexity"] == pytest.approx(runs[0].json["perplexity"], rel=1e-5)
    assert (
        runs[2].json["backends"]["linears"] == {"reference": 28} or "reference" in runs[2].json["backends"]["linears"]
    )
    assert {"perplexity", "nll", "tokens", "windows", "seqlen", "dtype", "protocol"} <= runs[0].json.keys()


def test_gate_passes_what_is_as_good_and_fails_what_is_worse(
    cli: Callable, tiny: str, run_folder: Path, text: str, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.json"
    assert cli("eval", tiny, "--data", text, *EVAL, "--write-baseline", baseline).code == 0
    assert cli("eval", tiny, "--data", text, *EVAL, "--baseline", baseline).code == 0
    worse = cli("eval", run_folder, "--data", text, *EVAL, "--baseline", baseline, "--max-increase", "1%")
    assert worse.code == 1
    assert "gate FAILED" in worse.err
    assert cli("eval", run_folder, "--data", text, *EVAL, "--baseline", baseline, "--max-increase", "9000%").code == 0
    other = cli("eval", tiny, "--data", text, "--windows", 4, "--seqlen", 128, "--baseline", baseline)
    assert other.code == 2
    assert "windows" in other.err


def test_generate(cli: Callable, run_folder: Path) -> None:
    first = cli("generate", run_folder, "--prompt", "The ", "--max-new-tokens", 8, "--json")
    again = cli("generate", run_folder, "--prompt", "The ", "--max-new-tokens", 8, "--json")
    assert first.code == 0
    assert first.json.keys() == {"text", "tokens", "tokens_per_second"}
    assert first.json["text"] == again.json["text"]
    assert 0 < first.json["tokens"] <= 8
    sampled = cli(
        "generate", run_folder, "--prompt", "The ", "--max-new-tokens", 8, "--temperature", "1.5", "--seed", 3
    )
    assert sampled.code == 0
    assert sampled.out.startswith("The ")
    assert cli("generate", run_folder, "--prompt", "").code == 2


def test_generate_in_c(cli: Callable, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object, **__: object) -> Callable:
        return lambda *_: pytest.fail("a step was compiled")

    monkeypatch.setattr(torch, "compile", compiled)
    options = ("--backend", "native", "--dtype", "bfloat16", "--fast", "--json")
    made = cli("generate", run_folder, "--prompt", "The ", "--max-new-tokens", 8, *options)
    assert made.code == 0
    assert 0 < made.json["tokens"] <= 8


def test_verify_finds_what_is_wrong(cli: Callable, tiny: str, run_folder: Path) -> None:
    assert cli("verify", run_folder).code == 0
    assert cli("verify", run_folder, "--pattern", "2:4").code == 0
    assert cli("verify", run_folder, "--pattern", "1:4").code == 1
    assert cli("verify", tiny, "--pattern", "2:4", "--json").json["ok"] is False
    weights = run_folder / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = cli("verify", run_folder)
    assert damaged.code == 1
    assert "model.safetensors: its bytes are not those that were written" in damaged.out


def test_inspect(cli: Callable, tiny: str, run_folder: Path) -> None:
    dense, pruned = cli("inspect", tiny, "--json").json, cli("inspect", run_folder, "--json").json
    assert dense["sparsity"] < 0.01
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert {row["pattern"] for row in pruned["linears"]} == {"2:4"}
    assert "model.layers.0.self_attn.q_proj" in cli("inspect", run_folder).out


def test_same_ids_and_seed_give_the_same_masks(cli: Callable, tiny: str, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 200, (6, 64)))
    hashes = []
    for name in ("a", "b"):
        done = cli("prune", tiny, tmp_path / name, "--data", tmp_path / "ids.npy", "--json")
        assert done.code == 0
        hashes.append(done.json["stages"][0]["metrics"]["masks_sha256"])
    assert hashes[0] == hashes[1]
    assert file_sha256(tmp_path / "a/model/masks.safetensors") == file_sha256(tmp_path / "b/model/masks.safetensors")


def test_prune_starts_from_the_masks_of_another_run(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    assert cli("prune", tiny, tmp_path / "first", "--method", "magnitude", "--pattern", "4:8").code == 0
    flags = ("--data", text, *FAST, "--method", "{dsnot: {cycles: 20}}", "--masks", tmp_path / "first")
    done = cli("prune", tiny, tmp_path / "second", *flags, "--json")
    assert done.code == 0, done.err
    (stage,) = done.json["stages"]
    assert stage["config"]["masks"] == str(tmp_path / "first")
    assert {row["pattern"] for row in stage["linears"]} == {"4:8"}
    assert sum(row["swaps"] for row in stage["linears"]) > 0
    for row in stage["linears"]:
        assert row["shift_after"] <= row["shift_before"]
        assert row["loss_after"] <= row["loss_before"]
    assert cli("verify", tmp_path / "second", "--pattern", "4:8").code == 0
    first, second = (Checkpoint(tmp_path / run / "model").masks() for run in ("first", "second"))
    changed = sum(int((first[name] ^ second[name]).sum()) for name in first)
    assert changed == 2 * sum(row["swaps"] for row in stage["linears"])

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny}\nstages:\n  - prune: {{method: dsnot, masks: {tmp_path / 'first'}}}\n")
    dry = cli("run", recipe, tmp_path / "third", "--dry-run")
    assert dry.code == 0
    assert "4:8" in dry.out + dry.err


def test_run_a_recipe_with_overrides(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny}\nstages:\n  - eval: &eval {{source: {text}, seqlen: 128, windows: 4}}\n"
        f"  - prune: {{pattern: 2:4, calibration: {{source: {text}, samples: 8, seqlen: 128}}}}\n"
        "  - export: {format: packed}\n  - eval: *eval\n"
    )
    dry = cli("run", recipe, tmp_path / "out", "--dry-run")
    assert dry.code == 0
    assert not (tmp_path / "out").exists()
    done = cli("run", recipe, tmp_path / "out", "--set", "stages.1.prune.pattern=4:8", "--json")
    assert done.code == 0
    before, pruned, packed, after = done.json["stages"]
    assert pruned["config"]["pattern"] == "4:8"
    assert packed["model"] == "model"
    assert before["metrics"]["perplexity"] < after["metrics"]["perplexity"]
    assert cli("verify", tmp_path / "out", "--pattern", "4:8").code == 0
    again = cli("run", recipe, tmp_path / "out", "--set", "stages.1.prune.pattern=4:8", "--json")
    assert again.code == 0
    assert again.json == done.json
    table = cli("run", recipe, tmp_path / "out", "--set", "stages.1.prune.pattern=4:8")
    assert "export" in table.out
    assert "packed" in table.out


def test_lists_and_recipes(cli: Callable) -> None:
    assert set(cli("list", "pruners", "--json").json["pruners"]) >= {"magnitude", "random", "wanda"}
    assert set(cli("list", "--json").json) == set(REGISTRIES) >= {"adapters", "pruners", "quantizers", "selectors"}
    assert cli("list", "pruner").code == 2
    assert "demo" in cli("recipe", "ls").out
    assert "wanda" in cli("recipe", "show", "demo").out
    assert cli("recipe", "schema").json["title"] == "Recipe"
    assert cli("--version").out.strip() == compressllm.__version__


@pytest.mark.parametrize("given", ["true", "{epochs: 1, learning_rate: 0.01}"])
def test_prune_reconstructs_what_stays(cli: Callable, tiny: str, text: str, tmp_path: Path, given: str) -> None:
    sizes = ("--samples", 2, "--seqlen", 32)
    done = cli("prune", tiny, tmp_path / "run", "--data", text, *sizes, "--reconstruct", given, "--json")
    assert done.code == 0
    (stage,) = done.json["stages"]
    assert stage["config"]["reconstruct"]["epochs"] == (5 if given == "true" else 1)
    assert stage["metrics"]["reconstruct"]["after"] < stage["metrics"]["reconstruct"]["before"]


@pytest.mark.parametrize("given", ["{epoch: 1}", "{epochs: 0}", "fast", "{unit: linear}"])
def test_a_wrong_reconstruction_is_one_line(cli: Callable, tiny: str, tmp_path: Path, given: str) -> None:
    done = cli("prune", tiny, tmp_path / "run", "--reconstruct", given)
    assert done.code == 2
    assert "reconstruct" in done.err
    assert done.err.count("\n") <= 2
