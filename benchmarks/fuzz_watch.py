"""What a process does while it reads a file it should not trust: files opened, programs started, code loaded."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NEVER = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect",
    "socket.getaddrinfo", "pickle.find_class", "marshal.loads", "shutil.rmtree", "ctypes.dlopen",
}  # fmt: skip
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALWAYS_READ = tuple(
    {os.path.realpath(one) for one in (sys.prefix, sys.base_prefix, Path(__file__).parent.parent)}
    | {"/proc", "/sys", "/usr", "/lib", "/dev/null", "/dev/urandom"}
)


class Watch:
    """Notes what happens between `begin` and `end`; made once, since the interpreter forgets no hook.

    Reading is allowed in one folder, and where Python's own files lie. Nothing may be written, started or unpickled.
    """

    def __init__(self) -> None:
        self._folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def on(self, folder: Path) -> Iterator[list[str]]:
        """What happened that should not, filled while the block runs."""
        self.seen = []
        self._folder = os.path.realpath(folder)
        try:
            yield self.seen
        finally:
            self._folder = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event == "open":
            self._opened(args[0], args[2])
        elif event in _NEVER or event in _CHANGES:
            if event == "marshal.loads" or (event == "ctypes.dlopen" and args[0] is None):
                return  # how modules come from their cache
            self.seen.append(f"{event} {args[:2]!r}"[:200])
        elif event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(self._folder):
            self.seen.append(f"exec {args[0].co_filename}")

    def _opened(self, path: Any, flags: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or self._folder is None:
            return  # a descriptor
        folder, self._folder = self._folder, None  # looking must not be looked at
        real = os.path.realpath(os.fsdecode(path))
        self._folder = folder
        if (flags or 0) & _WRITES and real != "/dev/null":
            self.seen.append(f"written: {real}")
        elif not real.startswith((folder + os.sep, folder, *_ALWAYS_READ)):
            self.seen.append(f"read: {real}")


@contextlib.contextmanager
def bounded(seconds: float, more_bytes: int | None) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds of computing, or ten times as many of waiting.

    Args:
        more_bytes: Address space that may be added to what the process has; None sets no limit.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    if more_bytes is not None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + more_bytes, before[1]))

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"took over {seconds} s")

    handlers = {kind: signal.signal(kind, late) for kind in (signal.SIGVTALRM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
