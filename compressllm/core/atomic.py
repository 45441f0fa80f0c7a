"""Files and folders that are under their final name whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

#: How the names of files end that `write_atomically` writes before they are renamed.
_SCRATCH: Final = ".scratch"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's contents in one step: readers see the old or the new, never a half.

    Raises: OSError, naming the file; the old contents stay.
    """
    with naming(path):
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=_SCRATCH)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):  # what happened first is what counts
                os.unlink(scratch)
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def drop_scratch(folder: Path, name: str = "") -> None:
    """Remove what killed calls of `write_atomically` left in a folder; only while nobody else writes there.

    Args:
        name: Only of files whose names begin so.
    """
    for path in folder.glob(f".{name}*{_SCRATCH}"):
        path.unlink(missing_ok=True)


def is_scratch(path: Path) -> bool:
    """Whether a killed call of `write_atomically` left this file."""
    return path.name.startswith(".") and path.name.endswith(_SCRATCH)


def put_in_place(work: Path, final: Path) -> None:
    """Give a finished folder its final name, under which there is nothing or an empty folder.

    All files in it are on the disk before that, and the name is when this returns. Raises OSError.
    """
    for path in sorted(work.iterdir()):
        sync(path)
    sync(work)
    os.replace(work, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Have a file's or a folder's contents survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP} or not path.is_dir():  # not for folders, on some systems
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(fd)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the operating system name this file if it names none: writes through a descriptor do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
