"""Formats sparse linears can be stored in, and what writes and loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressllm.export.writer import export_model as export_model
    from compressllm.export.writer import exported_sizes as exported_sizes


def __getattr__(name: str) -> Any:
    # The registry of formats and the transformers hook import this package; neither needs the writer's imports.
    if name in {"export_model", "exported_sizes"}:
        from compressllm.export import writer

        return getattr(writer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
