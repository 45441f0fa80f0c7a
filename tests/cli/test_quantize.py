"""``compressllm quantize`` on the trained tiny model, and every command on what it makes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FEW = ("--samples", 4, "--seqlen", 64)
EVAL = ("--windows", 8, "--seqlen", 128)


@pytest.fixture
def pruned(cli: Callable, tiny: str, tmp_path: Path) -> Path:
    """A run at 2:4 by magnitude."""
    assert cli("prune", tiny, tmp_path / "pruned", "--method", "magnitude", "--pattern", "2:4").code == 0
    return tmp_path / "pruned"


def test_every_command_takes_a_quantised_model(cli: Callable, pruned: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = cli("quantize", pruned, out, "--scheme", "int4-g32", "--method", "gptq", "--data", text, *FEW)
    assert made.code == 0, made.err
    assert all(word in made.out for word in ("quantize", "gptq", "int4-g32"))
    (stage,) = json.loads((out / "manifest.json").read_text())["stages"]
    assert stage["metrics"]["bytes_after"] < stage["metrics"]["bytes_before"]
    before = json.loads((pruned / "manifest.json").read_text())["stages"][0]["metrics"]
    assert stage["metrics"]["masks_sha256"] == before["masks_sha256"]

    assert cli("verify", out, "--pattern", "2:4").code == 0
    seen = cli("inspect", out, "--json").json
    assert {row["scheme"] for row in seen["linears"]} == {"int4-g32"}
    assert seen["bytes"] < seen["bytes_dense"]
    assert "int4-g32" in cli("inspect", out).out

    plain = cli("eval", pruned, "--data", text, *EVAL, "--json").json["perplexity"]
    for backend in ("dense", "reference", "auto"):
        measured = cli("eval", out, "--data", text, *EVAL, "--backend", backend, "--json")
        assert measured.code == 0, measured.err
        assert 0.95 * plain < measured.json["perplexity"] < 1.2 * plain
    assert cli("generate", out, "--prompt", "The ", "--max-new-tokens", 4).code == 0
    quick = ("--backend", "reference", "--batch", 1, "--prompt", 5, "--new-tokens", 3, "--seconds", 0)
    benched = cli("bench", out, *quick, "--json")
    assert benched.code == 0, benched.err
    assert [row["backend"] for row in benched.json["rows"]] == ["dense", "reference"]

    again = cli("quantize", out, tmp_path / "twice", "--method", "rtn")
    assert again.code == 2
    assert "is quantised already" in again.err
    assert not (tmp_path / "twice").exists()


def test_wrong_names_get_a_suggestion(cli: Callable, tiny: str, tmp_path: Path) -> None:
    wrong = cli("quantize", tiny, tmp_path / "out", "--method", "gptx")
    assert wrong.code == 2
    assert "did you mean 'gptq'" in wrong.err
    wrong = cli("quantize", tiny, tmp_path / "out", "--scheme", "int5")
    assert wrong.code == 2
    assert "int4-g128" in wrong.err


def test_for_compressed_tensors_and_back(cli: Callable, pruned: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = cli("quantize", pruned, out, "--scheme", "int8-dynamic", "--method", "rtn", "--format", "compressed-tensors")
    assert made.code == 0, made.err
    config = json.loads((out / "model" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert cli("verify", out, "--pattern", "2:4").code == 0
    assert {row["scheme"] for row in cli("inspect", out, "--json").json["linears"]} == {"int8-dynamic"}
    plain = cli("eval", pruned, "--data", text, *EVAL, "--json").json["perplexity"]
    measured = cli("eval", out, "--data", text, *EVAL, "--backend", "dense", "--json").json["perplexity"]
    assert measured == pytest.approx(plain, rel=0.02)
    assert measured != plain
    wrong = cli("export", pruned, tmp_path / "plain", "--format", "compressed-tensors")
    assert wrong.code == 2
    assert "run `compressllm quantize` first" in wrong.err
