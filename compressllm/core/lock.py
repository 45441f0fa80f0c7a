"""One process at a time at an output: a lock file that says who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from compressllm.core.errors import RunError

#: What a file system says that has no locks.
_WITHOUT = frozenset({errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS})


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        boot: Which start of its machine it belongs to; empty where the system does not tell.
        started: When it started, in ticks since then: a process number is used again.
        since: When it took the lock.
    """

    pid: int
    host: str
    boot: str
    started: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def lives(self) -> bool:
        """Whether it may still be there; of another host that cannot be known, and is taken to be so."""
        if self.host != socket.gethostname():
            return True
        return self.boot == _boot() and self.started == _started(self.pid) != ""


class Lock:
    """Held from when it is made to `release`, or to the end of a ``with``.

    The kernel drops it when its process dies, however it dies, so a file that was left behind is taken over at once.
    On file systems without locks the holder that the file names counts for as long as it lives.

    Args:
        path: The lock file: made, and removed on release. Its folder exists.
        what: What it guards, for the message.

    Raises: RunError if another process holds it, naming that; OSError if the file cannot be made.
    """

    def __init__(self, path: Path, what: object) -> None:
        self._path, self._what = path, what
        self._fd = self._open()
        while not self._is_the_file():  # its holder removed it between our opening and our locking it
            os.close(self._fd)
            self._fd = self._open()
        holder = Holder(os.getpid(), socket.gethostname(), _boot(), _started(os.getpid()), _now())
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(asdict(holder)).encode(), 0)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:  # on a full disk it holds all the same
                self.release()
                raise

    def release(self) -> None:
        """Let others have it."""
        try:
            if self._is_the_file():
                self._path.unlink()  # while it is held, so that nobody holds a file without a name
        finally:
            os.close(self._fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self) -> int:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(fd)
            if error.errno in _WITHOUT and (holder is None or not holder.lives()):
                return fd
            os.close(fd)
            raise RunError(
                f"{self._what}: is in use by {holder or 'another process'}; wait for it or give another place"
            ) from None
        return fd

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False


def _read(fd: int) -> Holder | None:
    """What a lock file says; None if it says nothing of the kind, as one does that is just being made."""
    try:
        return Holder(**json.loads(os.pread(fd, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started; empty if there is none, or the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]  # the name before it may hold anything


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
