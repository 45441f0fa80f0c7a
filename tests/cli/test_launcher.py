"""Commands started by a launcher with several processes."""

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressllm.cli.app import main
from compressllm.core.errors import CalibrationError
from compressllm.models.shards import file_sha256

RECIPE = """\
model: {model}
stages:
  - prune: {{pattern: 2:4, calibration: {{source: {text}, samples: 8, seqlen: 128}}}}
  - prune: {{pattern: 1:4, method: magnitude}}
  - export: {{format: packed}}
  - eval: {{source: {text}, seqlen: 128, windows: 2}}
"""


@pytest.fixture
def recipe(tiny: str, text: str, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny, text=text))
    return path


@pytest.fixture
def command(launch: Callable[..., list[Any]]) -> Callable[..., list[tuple[int, str, str]]]:
    """``command("run", recipe, out)``: exit code, stdout and stderr of each of two launched processes."""

    def run(*arguments: object, prepare: Callable[[int], None] = lambda rank: None) -> list[tuple[int, str, str]]:
        def work(rank: int) -> tuple[int, str, str]:
            prepare(rank)
            sys.argv = ["compressllm", *map(str, arguments)]
            sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
            code = 0
            try:
                main()
            except SystemExit as exit:
                code = int(exit.code or 0)
            return code, sys.stdout.getvalue(), sys.stderr.getvalue()

        return launch(work)

    return run


def test_a_recipe_is_run_by_all_processes_and_the_first_speaks(command: Callable, recipe: Path, tmp_path: Path) -> None:
    (code, out, err), (other_code, other_out, other_err) = command("run", recipe, tmp_path / "out", "--json")
    assert (code, other_code) == (0, 0), err + other_err
    assert other_out == other_err == ""
    assert "pruning" in err
    manifest = json.loads(out)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [stage["metrics"].get("processes") for stage in manifest["stages"]] == [2, 2, None, None]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_all_with_one_line(
    command: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    def fail(*arguments: object) -> None:
        raise CalibrationError("broken here")

    def prepare(rank: int) -> None:
        if rank == failing:
            monkeypatch.setattr("compressllm.prune.wanda.Wanda.score", fail)

    (code, out, err), (other_code, other_out, other_err) = command("run", recipe, tmp_path / "out", prepare=prepare)
    assert (code, other_code) == (2, 2)
    assert out == other_out == other_err == ""
    named = r"model\.layers\.0\.\S+_proj: broken here\n"
    assert re.search(rf"error: {named}$" if failing == 0 else rf"error: rank 1: {named}$", err)
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_stage_of_the_first_ends_all(
    command: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("compressllm.stages.export.export_stage", fail)
    (code, _, err), (other_code, _, other_err) = command("run", recipe, tmp_path / "out")
    assert (code, other_code) == (2, 2)
    assert "error: somewhere: No space left on device" in err
    assert other_err == ""
    monkeypatch.undo()
    ended = command("run", recipe, tmp_path / "out")
    assert [code for code, _, _ in ended] == [0, 0], ended


def test_both_processes_killed_the_same_command_goes_on(
    command: Callable, launch: Callable, tiny: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.models.record import FolderRecord

    arguments = ["prune", tiny, str(tmp_path / "out"), "--data", text, "--samples", "8", "--seqlen", "128"]
    finish = FolderRecord.finish

    def die(self: FolderRecord, *arguments: Any) -> None:
        if len(self.rows) >= 14:
            os._exit(9)
        finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FolderRecord, "finish", die)

        def work(rank: int) -> None:
            sys.argv = ["compressllm", *arguments]
            try:
                main()
            finally:
                os._exit(9)

        assert launch(work) == [None, None]
    assert len(json.loads((tmp_path / "out" / "01-prune" / "progress.json").read_text())["blocks"]) == 2
    ended = command(*arguments)
    assert [code for code, _, _ in ended] == [0, 0], ended
    arguments[2] = str(tmp_path / "whole")
    ended = command(*arguments)
    assert [code for code, _, _ in ended] == [0, 0], ended
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stages"][0]["metrics"]["resumed_at_block"] == 2
    for name in ("model.safetensors", "masks.safetensors"):
        assert file_sha256(tmp_path / "out" / "model" / name) == file_sha256(tmp_path / "whole" / "model" / name)


@pytest.mark.parametrize("stage", ["prune", "recover"])
def test_a_model_stays_where_it_is_until_the_slower_process_has_opened_it(
    command: Callable, tiny: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from compressllm.models.checkpoint import Checkpoint

    begin = Checkpoint.__init__

    def late(self: Checkpoint, folder: Path) -> None:
        if folder.parent.name == f"01-{stage}":
            time.sleep(1)
        begin(self, folder)

    def prepare(rank: int) -> None:
        if rank == 1:
            monkeypatch.setattr(Checkpoint, "__init__", late)

    arguments: list[object] = ["prune", tiny, tmp_path / "pruned", "--method", "magnitude"]
    if stage == "recover":
        command(*arguments)
        data = ["--data", text, "--seqlen", "32", "--max-tokens", "512", "--batch-tokens", "256"]
        arguments = ["recover", tmp_path / "pruned", tmp_path / "recovered", "--losses", "ce=1.0", *data]
    ended = command(*arguments, prepare=prepare)
    assert [code for code, _, _ in ended] == [0, 0], ended


@pytest.mark.parametrize("made", ["teacher", "records"])
def test_processes_share_what_is_made_before_training(
    command: Callable, tiny: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    monkeypatch.chdir(tmp_path)  # only the first knows the output by the name that was given
    command("prune", tiny, "pruned", "--method", "magnitude")
    rows = [{"instruction": f"Say {number}.", "output": f"{number} it is."} for number in range(40)]
    Path("records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {
        "teacher": ["--data", text, "--teacher-tokens", "512"],
        "records": ["--records", "records.jsonl", "--select", "random:budget=20"],
    }
    flags = ["--teacher", tiny, "--seqlen", "64", "--max-tokens", "512", "--batch-tokens", "256"]
    ended = command("recover", "pruned", "out", *flags, *before[made])
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert command("verify", "out", "--pattern", "2:4")[0][0] == 0


def test_other_commands_are_the_firsts_alone(command: Callable, tiny: str) -> None:
    (code, out, _), (other_code, other_out, other_err) = command("inspect", tiny, "--json")
    assert (code, other_code) == (0, 0)
    assert json.loads(out)["linears"]
    assert other_out == other_err == ""


def test_a_recipe_that_is_not_one_ends_all(command: Callable, tmp_path: Path) -> None:
    (code, _, err), (other_code, _, _) = command("run", tmp_path / "none.yaml", tmp_path / "out")
    assert (code, other_code) == (2, 2)
    assert "none.yaml" in err
