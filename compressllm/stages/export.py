"""The export stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressllm.core.errors import FormatError
from compressllm.core.run import Run
from compressllm.export.config import ExportConfig
from compressllm.export.modelcard import CARD, write_card
from compressllm.export.sizes import exported_sizes
from compressllm.export.writer import export_model
from compressllm.models.bundle import Bundle, bundle_of
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.seal import seal


def export_stage(bundle: Bundle, config: ExportConfig, run: Run) -> Bundle:
    """Write the bundle's checkpoint to ``run.folder / "model"`` in the format asked for.

    Raises: FormatError.
    """
    if bundle.checkpoint is None or run.folder is None:
        raise FormatError("exporting needs a checkpoint on disk and a folder to write to")
    facts = export_model(bundle.checkpoint, run.folder / "model", config.format, run.show)
    checkpoint = Checkpoint(run.folder / "model")
    sizes = exported_sizes(checkpoint)
    run.metrics.update(
        format=facts.format,
        linears=len(facts.linears),
        masks_sha256=facts.masks_sha256,
        sparse_bytes_dense=sizes.dense,
        sparse_bytes=sizes.stored,
        sparse_ratio=sizes.ratio,
    )
    return bundle_of(checkpoint, bundle.tokenizer, bundle.model)


def complete_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the model card of what a run ships, with all that the run measured.

    That is of an export, which had one already, and of a packed model; other folders have none.
    """
    if folder.is_dir():
        checkpoint = Checkpoint(folder)
        if checkpoint.facts and (checkpoint.facts.variant or (folder / CARD).exists()):
            write_card(folder, checkpoint.facts, exported_sizes(checkpoint).ratio, manifest)
            seal(folder, checkpoint.facts.sha256)
