import errno
import os
from pathlib import Path

import pytest

from compressllm.core.atomic import drop_scratch, naming, put_in_place, write_atomically


def test_a_failed_write_leaves_the_old_contents_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_scratch_of_a_killed_write_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    kept = {"a.json", ".hidden", ".b.json-12345678.scratch"}
    for name in (*kept, ".a.json-12345678.scratch"):
        (tmp_path / name).touch()
    drop_scratch(tmp_path, "a.json")
    assert {path.name for path in tmp_path.iterdir()} == kept
    drop_scratch(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", ".hidden"}


def test_all_of_a_folder_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, final, calls = tmp_path / "work", tmp_path / "final", []
    work.mkdir()
    for name in ("a", "b"):
        (work / name).write_text(name)
    real_sync, real_replace = os.fsync, os.replace

    def sync(fd: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_sync(fd)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    put_in_place(work, final)
    assert calls == ["a", "b", "work", "replace", tmp_path.name]
    assert (final / "b").read_text() == "b"


def test_an_error_that_names_its_file_keeps_that_name() -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(Path("other")):
        Path("not there").read_text()
    assert caught.value.filename == "not there"
