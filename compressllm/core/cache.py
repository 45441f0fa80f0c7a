"""Where what is made once on this machine is kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``$COMPRESSLLM_CACHE``, or compressllm's part of the user's cache folder."""
    if chosen := os.environ.get("COMPRESSLLM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compressllm"


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(work, path)
    except BaseException:
        os.unlink(work)
        raise
