import fcntl
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from compressllm.core.errors import RunError
from compressllm.core.lock import Holder, Lock


def hold(path: Path, ready: Connection) -> None:
    Lock(path, path.parent)
    ready.send(True)
    time.sleep(60)


@pytest.fixture
def other(tmp_path: Path) -> Callable[[], int]:
    """The number of a process that holds the lock, and is killed at the end of the test at the latest."""
    started = []

    def start() -> int:
        context = multiprocessing.get_context("fork")
        end, ready = context.Pipe(duplex=False)
        process = context.Process(target=hold, args=(tmp_path / ".lock", ready), daemon=True)
        process.start()
        assert end.poll(30)
        started.append(process)
        return int(process.pid or 0)

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_second_is_told_who_holds_it(tmp_path: Path, other: Callable[[], int]) -> None:
    pid = other()
    with pytest.raises(RunError, match=rf"out: is in use by process {pid} on \S+ since 20\S+; wait"):
        Lock(tmp_path / ".lock", "out")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, other: Callable[[], int]) -> None:
    pid = other()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == pid
    with Lock(tmp_path / ".lock", "out"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_who_opened_a_file_that_was_then_removed_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, raced = tmp_path / ".lock", fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not raced:  # just now its holder is done
            raced.append(fd)
            path.unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Lock(path, "out"):
        assert raced
        assert os.stat(path).st_ino  # the name is there, and it is the file that is held
        with pytest.raises(RunError):
            Lock(path, "out")


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),
        ({"started": "1"}, True),
        ({"boot": "before"}, True),
        ({"host": "b"}, False),
    ],
    ids=["alive", "dead", "number used again", "before a restart", "another host"],
)
def test_without_locks_of_the_file_system_the_holder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], taken: bool
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    path = tmp_path / ".lock"
    lock = Lock(path, "out")
    facts = json.loads(path.read_text()) | changed
    lock.release()
    path.write_text(json.dumps(facts))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    if taken:
        Lock(path, "out").release()
    else:
        with pytest.raises(RunError, match=re.escape(str(Holder(**facts)))):
            Lock(path, "out")
