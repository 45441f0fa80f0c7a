"""Run a recipe for a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from compressllm.cli.output import print_json, show, warn
from compressllm.cli.stopping import keeping
from compressllm.cli.summary import print_summary
from compressllm.core.errors import CompressError

if TYPE_CHECKING:
    from compressllm.stages.recipe import Recipe


def run_and_print(recipe: Recipe, out: Path, resume: bool, as_json: bool) -> None:
    """Run a recipe with progress on stderr, and print its summary, or its manifest, on stdout.

    The processes of a launcher do it together; the first speaks for all of them.

    Raises: CompressError of the kind that fits; Stopped, saying where finished work is.
    """
    from compressllm.core.launch import launched_ranks
    from compressllm.core.ranks import ALONE, Ranks
    from compressllm.stages.runner import run_recipe

    ranks: Ranks = ALONE
    try:
        with keeping(f"finished work is in {out}"), launched_ranks() as ranks:
            manifest = run_recipe(recipe, out, resume=resume, show=show, on_warning=warn, ranks=ranks)
    except (CompressError, OSError):
        if ranks.rank and ranks.told:  # the first process has it too, and says it
            raise typer.Exit(2) from None
        raise
    if ranks.rank:
        return
    if as_json:
        print_json(manifest)
    else:
        print_summary(manifest, out)
