"""``compressllm recipe``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from compressllm.cli.arguments import AsJson
from compressllm.cli.output import print_json, results, say
from compressllm.core.atomic import write_atomically

if TYPE_CHECKING:
    from compressllm.stages.recipe import Family

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A recipe file, or a name from `compressllm recipe ls`.")]


@app.command()
def ls(as_json: AsJson = False) -> None:
    """List the recipes that come with compressllm, the families they are for, and what they cost there."""
    from compressllm.stages.recipe import read_recipe
    from compressllm.stages.shipped import shipped_recipes

    recipes = {name: read_recipe(path) for name, path in shipped_recipes().items()}
    if as_json:
        print_json({name: one.model_dump(mode="json", exclude={"stages"}) for name, one in recipes.items()})
        return
    table = Table(show_header=False, box=None)
    for name, recipe in recipes.items():
        table.add_row(name, recipe.description)
        for family, one in recipe.families.items():
            table.add_row("", f"--model {family}: {one.model}, {cost_text(one)}", style="dim")
    results.print(table)


def cost_text(family: Family) -> str:
    """``"1.5 H100 hours, 4 GPUs of 52 GB, estimated"``."""
    gpus = f"{family.gpus} GPUs of " if family.gpus > 1 else ""
    basis = "measured" if family.measured else "estimated"
    return f"{family.gpu_hours:g} H100 hours, {gpus}{family.gpu_gb:g} GB, {basis}"


@app.command()
def show(recipe: Name) -> None:
    """Print a recipe with all its defaults."""
    from compressllm.stages.recipe import read_recipe
    from compressllm.stages.shipped import find_recipe

    results.print(read_recipe(find_recipe(recipe)).to_yaml(), end="", markup=False, soft_wrap=True)


@app.command()
def validate(recipes: Annotated[list[Path], typer.Argument(help="Recipe files.")]) -> None:
    """Check recipes; every mistake is reported with its line."""
    from compressllm.stages.recipe import read_recipe

    for path in recipes:
        read_recipe(path)
        results.print(f"{path}: ok", soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from compressllm.stages.recipe import Recipe

    print_json(Recipe.model_json_schema())


@app.command("from-llmcompressor")
def from_llmcompressor(
    file: Annotated[Path, typer.Argument(help="A recipe of llm-compressor, with stages or without.")],
    model: Annotated[str, typer.Option(help="What it is to work on; theirs do not say.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="Write it there, not to stdout.")] = None,
) -> None:
    """Convert a recipe of llm-compressor; what has no equal is told, a line each."""
    from compressllm.stages.llmcompressor import convert_recipe

    converted = convert_recipe(file, model)
    for note in converted.notes:
        say(note, style="yellow")
    text = converted.recipe.to_yaml()
    if out:
        write_atomically(out, text)
        results.print(str(out), soft_wrap=True, markup=False)
    else:
        results.print(text, end="", markup=False, soft_wrap=True)
