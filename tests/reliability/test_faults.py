"""Disks that fail under a run: a few of what benchmarks/fault_matrix.py does, and one disk that is really full."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_matrix import KINDS, places, try_place
from faults import die
from workloads import clean_refusal, differing, fingerprint, half_written

PROGRESS = ("replace", "out/01-prune/progress.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_disk_is_one_line_and_the_run_goes_on(matrix: Any, kind: str) -> None:
    tried = places(matrix.undisturbed("export")[1])
    assert len(tried) > 40
    for place in tried[KINDS.index(kind) :: 20]:  # others of each
        assert try_place(matrix, "export", kind, place) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A tmpfs of so many kilobytes, and the same one again in another size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def size(kilobytes: int) -> Path:
        options = f"size={kilobytes}k" + (",remount" if os.path.ismount(disk) else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return disk

    yield size
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_and_is_made_larger(
    matrix: Any, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = matrix.undisturbed("whole")[0]
    base = small_disk(1800)
    monkeypatch.setattr("compressllm.stages.runner.check_space", lambda *arguments: None)  # which would not begin
    ended = matrix.workloads.run("whole", base)
    assert clean_refusal(ended) is None
    assert os.strerror(errno.ENOSPC) in ended.err
    assert half_written(base / "out") == []
    monkeypatch.undo()
    again = matrix.workloads.run("whole", small_disk(40_000))
    assert again.code == 0, again.err
    assert differing(wanted, fingerprint(base / "out")) == []


def test_a_run_that_will_not_fit_does_not_begin(matrix: Any, small_disk: Callable[[int], Path]) -> None:
    base = small_disk(1000)
    ended = matrix.workloads.run("whole", base)
    assert clean_refusal(ended) is None
    assert "the run needs about" in ended.err
    assert "are free" in ended.err
    assert not (base / "out").exists()


def killed_late(matrix: Any) -> Path:
    """A run killed after it noted its first block and before it noted its last."""
    points = matrix.undisturbed("wanda")[1]
    noted = [index for index, point in enumerate(points) if (point.call, point.path) == PROGRESS]
    assert len(noted) == 2
    base = matrix.new()
    assert matrix.workloads.run("wanda", base, die(noted[-1])).code == -9
    return Path(base)


def test_what_vanished_from_a_begun_stage_is_named(matrix: Any) -> None:
    base = killed_late(matrix)
    lost = base / "out" / "01-prune" / "model.partial" / "model.safetensors"
    lost.unlink()
    ended = matrix.workloads.run("wanda", base)
    assert clean_refusal(ended) is None
    assert "is gone, and finished work with it" in ended.err
    shutil.rmtree(base / "out" / "01-prune")
    assert matrix.workloads.run("wanda", base).code == 0


def test_a_damaged_journal_is_named(matrix: Any) -> None:
    base = killed_late(matrix)
    journal = base / "out" / "01-prune" / "progress.json"
    journal.write_text(journal.read_text()[:-9])
    ended = matrix.workloads.run("wanda", base)
    assert clean_refusal(ended) is None
    assert f"{journal}: is damaged" in ended.err
