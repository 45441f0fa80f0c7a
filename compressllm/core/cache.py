"""Where this user's derived files are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models and compiled kernels are kept: ``$COMPRESSLLM_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("COMPRESSLLM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compressllm"
