"""``compressllm run``."""

from __future__ import annotations

from typing import Annotated

import typer

from compressllm.cli.arguments import AsJson, Out, Resume
from compressllm.cli.output import results, say
from compressllm.cli.running import run_and_print


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one from `compressllm recipe ls`.")],
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="Run it on this model: a family of the recipe, as qwen3, or any other model.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, as in stages.0.prune.pattern=4:8.")] = None,
    resume: Resume = True,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything and print the resolved recipe; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe."""
    from compressllm.stages.recipe import read_recipe
    from compressllm.stages.runner import check_recipe
    from compressllm.stages.shipped import find_recipe

    resolved = read_recipe(find_recipe(recipe), set_ or (), model)
    if dry_run:
        for line in check_recipe(resolved):
            say(line)
        results.print(resolved.to_yaml(), end="", markup=False, soft_wrap=True)
        return
    run_and_print(resolved, out, resume, as_json)
