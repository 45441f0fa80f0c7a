"""Every place where a process changes files below a folder, so that it can be made to fail there, or to die.

A visitor is called before each such place and, where bytes are written, once more when half of them are.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


class Point(NamedTuple):
    """A place in a run: which call, half way or not, on which file."""

    call: str
    half: bool
    path: str


Visit = Callable[[int, Point], None]
#: Calls that need no room on the disk.
FREEING = frozenset({"unlink", "rmdir", "replace", "fsync"})


@contextlib.contextmanager
def visited(root: Path, visit: Visit) -> Iterator[None]:
    """Call ``visit(index, point)`` at every place below ``root``; it may raise, and it may not return."""
    root = root.resolve()
    count = iter(range(1 << 40))

    def at(call: str, path: str, half: bool = False) -> None:
        if Path(path).is_relative_to(root):
            visit(next(count), Point(call, half, str(Path(path).relative_to(root))))

    def fd_path(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def named(path: Any, dir_fd: int | None = None) -> str:
        where = fd_path(dir_fd) if dir_fd is not None else os.getcwd()
        return os.path.join(where, os.fspath(path))

    def by_name(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            at(name, named(path, options.get("dir_fd")))
            return real(path, *rest, **options)

        return call

    def by_fd(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *rest: Any) -> Any:
            at(name, fd_path(fd))
            return real(fd, *rest)

        return call

    real_open, real_os_open, real_pwrite, real_replace = io.open, os.open, os.pwrite, os.replace

    def os_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            at("open", named(path, options.get("dir_fd")))
        return real_os_open(path, flags, *rest, **options)

    def pwrite(fd: int, data: Any, offset: int) -> int:
        at("pwrite", fd_path(fd))
        half = len(data) // 2
        done = real_pwrite(fd, data[:half], offset) if half else 0
        if done == half:
            at("pwrite", fd_path(fd), half=True)
            done += real_pwrite(fd, data[half:], offset + half)
        return done

    def open_(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        writes = any(letter in mode for letter in "wax+")
        if writes and not isinstance(file, int):
            at("open", named(file))
        opened = real_open(file, mode, *rest, **options)
        return _File(opened, at, fd_path(opened.fileno())) if writes else opened

    def replace(source: Any, target: Any, **options: Any) -> None:
        at("replace", named(target))
        real_replace(source, target, **options)

    patches: list[tuple[Any, str, Any]] = [
        (os, "open", os_open),
        (os, "pwrite", pwrite),
        (os, "replace", replace),
        (os, "rename", replace),
        (io, "open", open_),
        (builtins, "open", open_),
        *((os, name, by_name(name, getattr(os, name))) for name in ("mkdir", "rmdir")),
        *((os, name, by_name("unlink", getattr(os, name))) for name in ("unlink", "remove")),
        *((os, name, by_fd(name, getattr(os, name))) for name in ("fsync", "ftruncate", "posix_fallocate", "sendfile")),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, wrapper in patches:
            stack.enter_context(mock.patch.object(owner, name, wrapper))
        yield


class _File:
    """A file open for writing whose writes are visited; all else is the file's own."""

    def __init__(self, file: Any, at: Callable[..., None], path: str) -> None:
        self._file, self._at, self._path = file, at, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def write(self, data: Any) -> int:
        self._at("write", self._path)
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._at("write", self._path, half=True)
        self._file.write(data[half:])
        return len(data)


def note(into: list[Point]) -> Visit:
    """Only note the places."""
    return lambda index, point: into.append(point)


def die(place: int, number: int = signal.SIGKILL) -> Visit:
    """At this place, send this process a signal."""

    def visit(index: int, point: Point) -> None:
        if index == place:
            os.kill(os.getpid(), number)

    return visit


def full(place: int) -> Visit:
    """From this place on the disk is full: nothing that needs room succeeds."""

    def visit(index: int, point: Point) -> None:
        if index >= place and point.call not in FREEING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return visit


def read_only(place: int) -> Visit:
    """From this place on nothing can be changed."""

    def visit(index: int, point: Point) -> None:
        if index >= place and point.call != "fsync":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    return visit


def failing(place: int) -> Visit:
    """This one call fails, as on a bad sector."""

    def visit(index: int, point: Point) -> None:
        if index == place:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return visit


def vanished(place: int, root: Path, away: Path) -> Visit:
    """At this place the folder is moved away."""
    move = os.rename

    def visit(index: int, point: Point) -> None:
        if index == place and root.exists():
            move(root, away)

    return visit
