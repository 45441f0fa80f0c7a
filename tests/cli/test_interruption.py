"""Runs that are stopped, and what the same command makes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compressllm.models.shards import file_sha256

RECIPE = """\
model: {model}
stages:
  - prune: {{pattern: 2:4, calibration: {{source: {text}, samples: 8, seqlen: 128}}}}
  - export: {{format: packed}}
"""


@pytest.fixture
def recipe(tiny: str, text: str, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny, text=text))
    return path


def test_ctrl_c_says_how_to_go_on(cli: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("compressllm.prune.model.prune_model", interrupted)
        done = cli("run", recipe, tmp_path / "out")
    assert done.code == 130
    assert "the same command goes on" in done.err
    assert cli("run", recipe, tmp_path / "out").code == 0


def test_what_a_killed_export_left_is_made_anew(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    whole = cli("run", recipe, tmp_path / "whole", "--json")
    assert whole.code == 0
    assert cli("run", recipe, tmp_path / "out").code == 0
    # As if killed after the export's folder had its final name, before the manifest had the stage.
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["stages"][1]
    (out / "manifest.json").write_text(json.dumps({**manifest, "finished": None}))
    (out / "model").rename(out / "02-export" / "model")
    (out / "02-export" / ".model-scratch").mkdir()
    assert cli("run", recipe, out).code == 0
    assert [path.name for path in (out / "02-export").iterdir()] == []
    name = "model.packed.safetensors"
    assert file_sha256(out / "model" / name) == file_sha256(tmp_path / "whole" / "model" / name)


def test_a_second_run_in_the_same_folder_is_refused(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compressllm", "run", str(recipe), str(tmp_path / "out")]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)
        second = cli("run", recipe, tmp_path / "out")
    finally:
        first.kill()
        first.wait()
    assert second.code == 2
    assert "in use by another run" in second.err
    assert cli("run", recipe, tmp_path / "out").code == 0  # the lock died with its owner
