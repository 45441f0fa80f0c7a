"""``compressllm export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressllm.cli.arguments import AsJson, Model, Out
from compressllm.cli.output import bytes_text, flag, given, print_json, results, show, warn
from compressllm.export.config import ExportConfig

if TYPE_CHECKING:
    from compressllm.models.checkpoint import Checkpoint


def export(
    model: Model,
    out: Out,
    format: Annotated[str | None, flag(ExportConfig, "format")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in the form it is shipped in; it is re-read and compared bit by bit."""
    from compressllm.models.checkpoint import Checkpoint
    from compressllm.models.resolve import resolve_model
    from compressllm.stages.recipe import make_config

    config = make_config(ExportConfig, given(format=format))
    export_and_print(Checkpoint(resolve_model(model)), out, config.format, as_json)


def convert(
    model: Annotated[str, typer.Argument(help="Hub id or folder in the format sparse-24-bitmask or sparse-bitmask.")],
    out: Out,
    format: Annotated[str | None, flag(ExportConfig, "format")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a sparse checkpoint of llm-compressor, which newer loaders do not read any more, into one of ours."""
    from compressllm.models.compressedtensors import BitmaskCheckpoint
    from compressllm.models.resolve import resolve_model
    from compressllm.stages.recipe import make_config

    config = make_config(ExportConfig, given(format=format))
    source = BitmaskCheckpoint(resolve_model(model))
    if source.quantised:
        warn("the model is quantised, and what is written is not: its codes become plain numbers, which are larger")
    export_and_print(source, out, config.format, as_json)


def export_and_print(source: Checkpoint, out: Path, format: str, as_json: bool) -> None:
    """Export a checkpoint and print how large it has become."""
    from compressllm.export.sizes import exported_sizes
    from compressllm.export.writer import export_model
    from compressllm.models.checkpoint import Checkpoint

    facts = export_model(source, out, format, show)
    sizes = exported_sizes(Checkpoint(out))
    total = sum(path.stat().st_size for path in out.iterdir())
    if as_json:
        facts_and_sizes = {"sparse_bytes_dense": sizes.dense, "sparse_bytes": sizes.stored, "bytes": total}
        print_json({**facts.model_dump(mode="json", exclude={"linears"}), **facts_and_sizes, "ratio": sizes.ratio})
        return
    results.print(
        f"{out}: {facts.format}, {len(facts.linears)} sparse linears in {bytes_text(sizes.stored)}, "
        f"{sizes.ratio:.4f} of their {bytes_text(sizes.dense)} dense; {bytes_text(total)} in all",
        soft_wrap=True,
    )
    if facts.variant:
        results.print(
            f"load: import compressllm; AutoModelForCausalLM.from_pretrained({str(out)!r}, variant={facts.variant!r})",
            soft_wrap=True,
        )
