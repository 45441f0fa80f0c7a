"""Packages that only a selection needs."""

from __future__ import annotations

import importlib.util


def sklearn_missing() -> str | None:
    """What to install for clustering, or None if it is there."""
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    return "needs scikit-learn and scipy; run: pip install 'compressllm[select]'" if missing else None
