"""What to say where the operating system refuses: a full disk, a folder that vanished."""

from __future__ import annotations

import errno
from typing import Final

_ROOM: Final = "make room"
_ADVICE: Final = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "its file system takes no files so large: give another place",
    errno.EROFS: "make it writable, or give another place",
    errno.EACCES: "make it writable, or give another place",
    errno.EPERM: "make it writable, or give another place",
    errno.ENOENT: "it was there before: bring it back",
    errno.EIO: "see to the disk",
}


def refusal(error: OSError) -> str:
    """One line: where, what the system says, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    advice = f"{_ADVICE[error.errno]}, then" if error.errno in _ADVICE else "once that is mended,"
    return f"{where}{error.strerror or error}; finished work is kept: {advice} the same command goes on with it"
