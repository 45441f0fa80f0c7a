"""Where what is made once on this machine is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$COMPRESSLLM_CACHE``, or compressllm's part of the user's cache folder."""
    if chosen := os.environ.get("COMPRESSLLM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compressllm"
