"""``compressllm eval --tasks`` and the gate on what it says, as a user would have them; offline."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

WORDS = ("sea", "road", "tower", "window", "garden", "letter", "horse", "winter", "river", "lamp", "stone", "bread")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"goal": f"To see the {word}", "sol1": "look at it.", "sol2": "xqj zzv kk.", "label": 0} for word in WORDS]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_eval_tasks_and_the_gate(cli: Callable, tiny: str, files: Path, tmp_path: Path) -> None:
    flags = ("--tasks", "piqa", "--task-files", files, "--num_fewshot", 0, "--dtype", "float32", "--backend", "dense")
    done = cli("eval", tiny, *flags, "--limit", 8, "--batch_size", 4, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["schema"] == 1
    assert found["tasks"]["piqa"]["items"] == 8
    assert found["tasks"]["piqa"]["metrics"]["acc"]["stderr"] is not None
    assert "perplexity" not in found
    before = tmp_path / "before.json"
    before.write_text(done.out)
    table = cli("eval", tiny, *flags, "--limit", 8)
    assert "acc_norm" in table.out

    worse = json.loads(done.out)
    worse["tasks"]["piqa"]["scores"]["acc_norm"] = [0] * 8
    worse["tasks"]["piqa"]["metrics"]["acc_norm"]["value"] = 0.0
    assert found["tasks"]["piqa"]["metrics"]["acc_norm"]["value"] > 0.7  # words against none
    (tmp_path / "after.json").write_text(json.dumps(worse))
    gate = cli("compare", before, tmp_path / "after.json", "--max-acc-drop", 0.5, "--annotate")
    assert gate.code == 1
    assert "::error title=accuracy failed::" in gate.err
    assert "points" in gate.err
    assert cli("compare", before, before, "--max-acc-drop", 0.5).code == 0
    assert cli("compare", before, before, "--max-ppl-increase", "1%").code == 2

    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny}\nstages:\n  - eval: {{tasks: [piqa], task_files: ['{files}'], limit: 8, dtype: float32,"
        " backend: dense}\n"
    )
    done = cli("run", recipe, run)
    assert done.code == 0, done.err
    assert "piqa: acc" in done.out
    assert cli("compare", before, run, "--max-acc-drop", 0).code == 0


def test_run_folders_and_packed_models_answer_alike(cli: Callable, tiny: str, files: Path, tmp_path: Path) -> None:
    run, packed = tmp_path / "run", tmp_path / "packed"
    assert cli("prune", tiny, run, "--method", "magnitude", "--pattern", "2:4").code == 0
    assert cli("export", run, packed, "--format", "packed").code == 0
    flags = ("--tasks", "piqa", "--task-files", files, "--limit", 6, "--dtype", "float32", "--json")
    dense = cli("eval", run, *flags, "--backend", "dense")
    kernel = cli("eval", packed, *flags, "--backend", "reference")
    assert kernel.code == 0, kernel.err
    assert kernel.json["backends"]["linears"].keys() == {"reference"}
    assert kernel.json["tasks"] == dense.json["tasks"]


def test_agreement_with_the_parent(cli: Callable, tiny: str, text: str) -> None:
    same = cli("eval", tiny, "--parent", tiny, "--data", text, "--seqlen", 32, "--windows", 2, "--json")
    assert same.code == 0, same.err
    assert same.json["agreement"]["next_token"] == 1
    assert same.json["agreement"]["next_tokens"] == 2 * 31
    assert same.json["agreement"]["same_prefix"] == same.json["agreement"]["new_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "arc_eazy", "--task-files", "."), "arc_eazy: none of . holds arc_eazy.jsonl"),
        (("--tasks", "piqa", "--task-files", "nowhere"), "is no folder"),
        (("--tasks", "piqa"), "its items cannot be fetched from the hub"),
        (("--tasks", "piqa", "--batch-size", "many"), "batch_size"),
        (("--tasks", "piqa", "--task-files", ".", "--write-baseline", "b.json"), "give --data too"),
    ],
)
def test_mistakes(cli: Callable, tiny: str, options: tuple, message: str) -> None:
    done = cli("eval", tiny, *options)
    assert done.code == 2
    assert message in done.err
