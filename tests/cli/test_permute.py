"""``compressllm permute`` and ``verify --against`` on the trained tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compressllm.models.shards import file_sha256

FAST = ("--samples", 4, "--seqlen", 64, "--rounds", 4)


@pytest.fixture
def run_folder(cli: Callable, tiny: str, text: str, tmp_path: Path) -> Path:
    """A run of all permutations."""
    assert cli("permute", tiny, tmp_path / "run", "--data", text, *FAST).code == 0
    return tmp_path / "run"


def test_permute_leaves_a_model_that_computes_the_same(cli: Callable, tiny: str, run_folder: Path) -> None:
    (stage,) = json.loads((run_folder / "manifest.json").read_text())["stages"]
    assert stage["stage"] == "permute"
    assert stage["metrics"]["permutations"] == len(stage["linears"]) == 2 * 4 + 1
    for retained in stage["metrics"]["retained"].values():
        assert retained["before"] < retained["after"]
    assert stage["metrics"]["largest_difference"] <= 1e-5
    name = "permutations.safetensors"
    assert file_sha256(run_folder / "model" / name) == file_sha256(run_folder / "01-permute" / name)
    assert stage["sha256"][name] == stage["metrics"]["permutations_sha256"]
    assert cli("verify", run_folder).code == 0
    same = cli("verify", run_folder, "--against", tiny)
    assert same.code == 0
    assert same.out.startswith("ok: ")
    assert "256 tokens of the builtin text" in same.out


def test_verify_against_fails_where_models_differ(cli: Callable, tiny: str, run_folder: Path) -> None:
    path = run_folder / "model/model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.self_attn.v_proj.weight"][0] *= 1.01
    save_file(weights, path, {"format": "pt"})
    other = cli("verify", run_folder, "--against", tiny, "--tokens", 64, "--json")
    assert other.code == 1
    assert not other.json["ok"]
    assert other.json["difference"] > other.json["tolerance"] == 1e-5
    assert other.json["tokens"] == 64
    assert cli("verify", run_folder, "--against", tiny, "--tolerance", 1).code == 0


def test_recipe_permutes_then_prunes(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    calibration = f"calibration: {{source: {text}, samples: 4, seqlen: 64}}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny}\nstages:\n  - permute: {{scope: [mlp, residual], rounds: 4, {calibration}}}\n"
        f"  - prune: {{pattern: 2:4, {calibration}}}\n"
    )
    dry = cli("run", recipe, tmp_path / "out", "--dry-run")
    assert "4 mlp, 1 residual" in dry.out + dry.err
    done = cli("run", recipe, tmp_path / "out", "--json")
    assert done.code == 0
    permuted, pruned = done.json["stages"]
    assert set(permuted["metrics"]["retained"]) == {"mlp", "residual"}
    assert pruned["metrics"]["sparsity"] == pytest.approx(0.5)
    assert cli("verify", tmp_path / "out", "--pattern", "2:4").code == 0
    again = cli("permute", tmp_path / "out", tmp_path / "again", "--data", text, *FAST)
    assert again.code == 2
    assert "is pruned already" in again.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--pattern", "0.5"), "0.5 has no groups"),
        (("--scope", "heads"), "heads"),
        (("--score", "wnada"), "did you mean 'wanda'"),
    ],
    ids=str,
)
def test_flags(cli: Callable, tiny: str, tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    done = cli("permute", tiny, tmp_path / "out", *flags)
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "out").exists()


def test_verify_against_another_vocabulary(cli: Callable, tiny: str, tiny_llama_folder: Path) -> None:
    done = cli("verify", tiny, "--against", tiny_llama_folder)
    assert done.code == 2
    assert "vocabulary" in done.err
