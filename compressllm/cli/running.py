"""Run a recipe for a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from compressllm.cli.output import print_json, say, show, warn
from compressllm.cli.summary import print_summary

if TYPE_CHECKING:
    from compressllm.stages.recipe import Recipe


def run_and_print(recipe: Recipe, out: Path, resume: bool, as_json: bool) -> None:
    """Run a recipe with progress on stderr, and print its summary, or its manifest, on stdout.

    Raises: CompressError of the kind that fits; typer.Exit with code 130 if interrupted.
    """
    from compressllm.stages.runner import run_recipe

    try:
        manifest = run_recipe(recipe, out, resume=resume, show=show, on_warning=warn)
    except KeyboardInterrupt:
        say(f"interrupted; finished work is in {out}, and the same command goes on with it", style="yellow")
        raise typer.Exit(130) from None
    if as_json:
        print_json(manifest)
    else:
        print_summary(manifest, out)
