"""``compressllm merge-lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressllm.cli.arguments import AsJson, Model, Out
from compressllm.cli.output import print_json, results, show
from compressllm.core.errors import RecipeError


def merge_lora(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA trained with PEFT on that model.")],
    out: Out,
    masked: Annotated[
        bool, typer.Option("--masked", help="Merge what falls on kept weights, and drop the rest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a plain LoRA into a pruned model under its masks, so that every zero stays."""
    from compressllm.export.writer import export_model
    from compressllm.models.resolve import resolve_model
    from compressllm.recover.mergelora import MaskedMerge

    merge = MaskedMerge(resolve_model(model), adapter)
    share = merge.facts.source["merged"]["dropped"] if merge.facts else 0.0
    if not masked:
        raise RecipeError(
            f"{adapter}: {share:.0%} of this LoRA's update, by squared norm, falls on pruned weights, and would fill "
            "them; train with adapter masklora instead, or merge with --masked, which drops that part"
        )
    facts = export_model(merge, out, "dense", show)
    if as_json:
        print_json(facts.model_dump(mode="json", exclude={"linears"}))
        return
    results.print(
        f"{out}: {len(facts.linears)} sparse linears; {share:.1%} of the update, by squared norm, "
        "fell on pruned weights and was dropped",
        soft_wrap=True,
    )
