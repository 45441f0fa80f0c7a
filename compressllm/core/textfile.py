"""Text files opened for reading, plain or gzip, of which no few bytes may become many."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

from compressllm.core.errors import CalibrationError

_MOST_TIMES = 100  # text of one letter aside, none is packed so well: prose takes a third or a quarter of its size
_FREE = 8 << 20  # what is always allowed: a few identical lines may well be packed so


def open_text_file(path: Path) -> io.BufferedReader:
    """A file opened for reading; of one whose name ends in ``.gz``, what is in it.

    Raises: OSError if it cannot be opened. Reading a .gz raises EOFError, zlib.error or gzip.BadGzipFile where it is
        damaged, and CalibrationError once it has grown to over a hundred times what was read of it.
    """
    if not path.is_file() and path.exists() and not path.is_dir():
        raise CalibrationError(f"{path}: is no regular file")  # a pipe would be waited for, a device has no end
    if not path.name.lower().endswith(".gz"):
        return path.open("rb")
    return io.BufferedReader(_Bounded(path))


def most_bytes(size: int) -> int:
    """The most that so many packed bytes may hold."""
    return max(_FREE, _MOST_TIMES * size)


class _Bounded(io.RawIOBase):
    """What a gzip file holds, up to a size that real text does not reach."""

    def __init__(self, path: Path) -> None:
        self._path, self._given = path, 0
        self._packed = path.open("rb")
        self._file = gzip.GzipFile(fileobj=self._packed)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, as far as there is something."""
        count = self._file.readinto(buffer)
        self._given += count
        if self._given > most_bytes(self._packed.tell()):  # of what was read so far: a bomb is found early
            raise CalibrationError(
                f"{self._path}: is a gzip file that grows to over {_MOST_TIMES} times its size, which no text does; "
                "unpack it yourself if it is what you want"
            )
        return count

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
            self._packed.close()
        super().close()
