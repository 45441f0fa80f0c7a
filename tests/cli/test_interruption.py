"""Runs that are stopped, and what the same command makes of them."""

import json
import os
import signal
import socket
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_with_a_line_on_how_to_go_on(
    cli: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    found = signal.signal(number, signal.default_int_handler)  # under nohup they are ignored, and stay so
    with monkeypatch.context() as patched:
        patched.setattr("compressllm.prune.model.prune_model", interrupted)
        done = cli("run", recipe, tmp_path / "my out")
    assert done.code == code
    assert done.err == (
        f"interrupted by {number.name}; finished work is in {tmp_path}/my out; "
        f"go on with: compressllm run {recipe} '{tmp_path}/my out'\n"
    )
    assert not (tmp_path / "my out" / ".lock").exists()
    assert signal.signal(number, found) is signal.default_int_handler
    if number == signal.SIGINT:
        assert cli("run", recipe, tmp_path / "my out").code == 0


def test_a_command_that_keeps_nothing_says_so(
    cli: Callable, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("compressllm.export.writer._compare", interrupted)
    found = signal.signal(signal.SIGTERM, signal.default_int_handler)
    done = cli("export", tiny, tmp_path / "out", "--format", "dense")
    signal.signal(signal.SIGTERM, found)
    assert done.code == 143
    assert done.err.splitlines()[-1].startswith("interrupted by SIGTERM; nothing half-written is left; go on with: ")
    assert list(tmp_path.iterdir()) == []


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
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)
        second = cli("run", recipe, tmp_path / "out")
    finally:
        first.kill()
        first.wait()
    assert second.code == 2
    assert f"in use by process {first.pid} on {socket.gethostname()} since " in second.err
    assert cli("run", recipe, tmp_path / "out").code == 0  # the lock died with its owner
