"""``SHA256SUMS``: the hash of every file of a checkpoint folder we wrote, as ``sha256sum --check`` reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compressllm.core.atomic import write_atomically
from compressllm.core.errors import FormatError
from compressllm.models.shards import file_sha256
from compressllm.models.sidefiles import inside

SUMS_NAME = "SHA256SUMS"
FACTS_NAME = "compressllm.json"  # the last in the list, so that it shows if the list is cut off
_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")


def seal(folder: Path, known: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` for the files that are in a folder now.

    Args:
        known: File name -> SHA-256, of the files that have been hashed already.
    """
    found = {path.name for path in folder.iterdir() if path.is_file()} - {SUMS_NAME}
    names = sorted(found, key=lambda name: (name == FACTS_NAME, name))
    sums = {name: known.get(name) or file_sha256(folder / name) for name in names}
    write_atomically(folder / SUMS_NAME, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def broken_seals(
    folder: Path, known: Mapping[str, str], show: Callable[..., Any] = lambda items, total, label: items
) -> list[str]:
    """Files whose bytes are not those that were written, or that are gone; ``SHA256SUMS`` if it is damaged itself.

    Args:
        known: File name -> SHA-256, of files that are held against it whatever ``SHA256SUMS`` says.
    """
    listed = _listed(folder)
    pairs = {*known.items(), *(listed or {}).items()}
    damaged = set() if listed is not None else {SUMS_NAME}
    for name, digest in show(sorted(pairs), len(pairs), "hashing"):
        if name not in damaged and not _holds(folder, name, digest):
            damaged.add(name)
    return sorted(damaged)


def _listed(folder: Path) -> dict[str, str] | None:
    """File name -> hash by ``SHA256SUMS``; nothing where there is none, None if it is damaged."""
    if not (folder / SUMS_NAME).exists():
        return {}
    try:
        lines = inside(folder, SUMS_NAME).read_text(encoding="utf-8").split("\n")
    except (FormatError, OSError, UnicodeDecodeError):
        return None
    matches = [_LINE.fullmatch(line) for line in lines[:-1]]
    listed = {match[2]: match[1] for match in matches if match}
    whole = not lines[-1] and all(matches) and list(listed)[-1:] == [FACTS_NAME]
    return listed if whole else None


def _holds(folder: Path, name: str, digest: str) -> bool:
    try:
        return file_sha256(inside(folder, name)) == digest
    except (FormatError, OSError, ValueError):  # a name with a NUL is a ValueError
        return False
