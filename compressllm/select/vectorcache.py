"""A file of short float32 vectors by content hash, which only grows."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_KEY_BYTES: Final = 16


class VectorCache:
    """Vectors of one width under 16-byte keys, each appended as soon as it is known, so that a killed run loses little.

    What a killed process wrote half of at the end is cut off by the next one.

    Args:
        path: The file, made with its folder on the first `append`; None keeps nothing.
        width: Numbers in a vector.
    """

    def __init__(self, path: Path | None, width: int) -> None:
        self._path = path
        self._row = np.dtype([("key", f"V{_KEY_BYTES}"), ("vector", "<f4", (width,))])
        self._place: dict[bytes, int] = {}
        self._vectors: npt.NDArray[np.float32] = np.empty((0, width), np.float32)
        if path is not None and path.exists():
            with path.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # not while another process writes a row
                file.truncate(file.seek(0, os.SEEK_END) // self._row.itemsize * self._row.itemsize)
                file.seek(0)
                rows = np.fromfile(file, self._row)
            self._vectors = rows["vector"]
            self._place = {key.tobytes(): place for place, key in enumerate(rows["key"])}

    def get(self, keys: Sequence[bytes]) -> Tensor | None:
        """(len(keys), width) if all of them were there when the file was opened, or else None."""
        if not all(key in self._place for key in keys):
            return None
        return torch.from_numpy(self._vectors[[self._place[key] for key in keys]])

    def append(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        """Keep (len(keys), width) vectors for later processes."""
        if self._path is None:
            return
        rows = np.empty(len(keys), self._row)
        rows["key"] = np.frombuffer(b"".join(keys), f"V{_KEY_BYTES}")
        rows["vector"] = vectors.float().cpu().numpy()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(rows.tobytes())


def content_key(*parts: object) -> bytes:
    """A 16-byte hash of what the parts say."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:_KEY_BYTES]


def content_name(parts: Iterable[object]) -> str:
    """The same as a file name."""
    return content_key(*parts).hex()
