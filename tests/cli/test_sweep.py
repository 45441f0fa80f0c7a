"""``compressllm sweep`` and ``compressllm prune``'s allocations, as a user would run them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FAST = ("--windows", 4, "--seqlen", 64)


@pytest.fixture
def text() -> str:
    return str(Path(__file__).parent.parent / "tiny" / "eval.txt")


def test_sweep_prints_a_table_and_goes_on_where_it_was(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    arguments = ("sweep", tiny, tmp_path / "out", "--sparsities", "0.4,2:4,0.8", "--data", text, *FAST)
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[:5]] == ["pattern", "dense", "0.4", "2:4", "0.8"]
    for kind in ("loss", "perplexity", "distance"):
        assert f"knee by {kind}: " in done.out
    assert str(tmp_path / "out" / "sweep.svg") in done.out
    again = cli(*arguments, "--json")
    assert again.json == json.loads((tmp_path / "out" / "sweep.json").read_text())
    other = cli("sweep", tiny, tmp_path / "out", "--sparsities", "0.4", "--data", text, *FAST)
    assert other.code == 2
    assert "holds a sweep with another config" in other.err


def test_sweep_of_a_calibrated_method_by_owl(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    calibration = ("--calibration-data", text, "--calibration-samples", 2, "--calibration-seqlen", 64)
    options = ("--method", "wanda", "--allocation", "owl", "--rise", "0.5", "--json")
    done = cli("sweep", tiny, tmp_path / "out", "--sparsities", "0.6", "--data", text, *FAST, *calibration, *options)
    assert done.code == 0, done.err
    assert done.json["points"][1]["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert done.json["knee"]["rise"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sparsities", "0.9:0:0.1"), "points: 0.9:0:0.1: is no range"),
        (("--method", "wnada"), "did you mean 'wanda'?"),
        (("--method", "wanda", "--pattern-group", "model"), "group model is one threshold on magnitude"),
        (("--pattern-group", "column"), "group: "),
    ],
)
def test_sweep_says_what_is_wrong_in_one_line(
    cli: Callable, tiny: str, tmp_path: Path, options: tuple, message: str
) -> None:
    done = cli("sweep", tiny, tmp_path / "out", *options)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_prune_with_owl_and_patterns_by_glob(cli: Callable, tiny: str, text: str, tmp_path: Path) -> None:
    options = ("--pattern", "0.6", "--allocation", "{owl: {spread: 0.05}}", "--layer-pattern", "*.down_proj=4:8")
    data = ("--data", text, "--samples", 2, "--seqlen", 64, "--json")
    done = cli("prune", tiny, tmp_path / "run", *options, "--layer-pattern", "*.o_proj=dense", *data)
    assert done.code == 0, done.err
    (stage,) = done.json["stages"]
    assert stage["metrics"]["sparsity"] == pytest.approx(stage["metrics"]["asked_sparsity"], abs=1e-4)
    sparsities = stage["metrics"]["allocation"]["block_sparsity"].values()
    assert max(sparsities) - min(sparsities) == pytest.approx(0.1)
    patterns = {row["linear"]: row["pattern"] for row in stage["linears"]}
    assert {patterns[name] for name in patterns if name.endswith("down_proj")} == {"4:8"}
    assert not any(name.endswith("o_proj") for name in patterns)
    assert "patterns:\n" in (tmp_path / "run" / "recipe.yaml").read_text()
    again = cli("prune", tiny, tmp_path / "bad", "--layer-pattern", "down_proj")
    assert again.code == 2
    assert "write GLOB=PATTERN" in again.err


def test_allocators_are_listed(cli: Callable) -> None:
    assert {"uniform", "owl", "global"} <= set(cli("list", "allocators", "--json").json["allocators"])
