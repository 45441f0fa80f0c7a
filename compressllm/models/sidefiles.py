"""The files of a checkpoint folder that are not ours to trust: they must lie in it, be files, and be of a sane size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from compressllm.core.errors import FormatError

#: Suffixes of the small files that loaders read and that go along to what is made of a checkpoint.
SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
_LARGEST = 256 << 20  # the largest tokenizers have 40 MB


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a checkpoint folder.

    Links may lead within the folder, or to the blobs that the hub's cache keeps beside its snapshots. Any other would
    have us read, and copy to the result, a file that the checkpoint's author named and its user did not.

    Raises: FormatError if it lies elsewhere, is missing, or is a device, a pipe or a folder.
    """
    path = folder / name
    home, real = os.path.realpath(folder), os.path.realpath(path)
    above = os.path.dirname(home)
    blobs = [os.path.join(os.path.dirname(above), "blobs")] if os.path.basename(above) == "snapshots" else []
    if not any(real.startswith(f"{root}{os.sep}") for root in (home, *blobs)):
        raise FormatError(f"{path}: lies outside its folder, at {real}; put a copy of the file itself there")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise FormatError(f"{path}: is missing or cannot be read: {error.strerror}; fetch it again") from None
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}: is no regular file; fetch it again")
    return path


def check_side_files(folder: Path) -> None:
    """Hold that every small file of a checkpoint folder is one: in it, regular, and not enormous.

    Raises: FormatError naming the first that is not.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and not path.is_dir():
            size = inside(folder, path.name).stat().st_size
            if size > _LARGEST:
                raise FormatError(f"{path}: has {size} bytes, at most {_LARGEST} are read; fetch it again")


def read_json(path: Path) -> Any:
    """What a JSON file of a checkpoint holds. Raises FormatError if it cannot be read, or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise FormatError(f"{path}: is nested too deeply; fetch it again") from None
    except ValueError as error:  # not text, not JSON, a number of thousands of digits
        raise FormatError(f"{path}: is not JSON ({' '.join(str(error).split())}); fetch it again") from None
