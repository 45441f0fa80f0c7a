"""Formats sparse linears can be stored in, and what writes and loads them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressllm.export.sizes import exported_sizes as exported_sizes
    from compressllm.export.writer import export_model as export_model

_IN = {"export_model": "writer", "exported_sizes": "sizes"}


def __getattr__(name: str) -> Any:
    # The registry of formats and the transformers hook import this package; neither needs the writer's imports.
    if name in _IN:
        return getattr(importlib.import_module(f"{__name__}.{_IN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
