"""``compressllm recipe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from compressllm.cli.output import print_json, results

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A recipe file, or a name from `compressllm recipe ls`.")]


@app.command()
def ls() -> None:
    """List the recipes that come with compressllm."""
    from compressllm.stages.recipe import read_recipe
    from compressllm.stages.shipped import shipped_recipes

    table = Table(show_header=False, box=None)
    for name, path in shipped_recipes().items():
        table.add_row(name, read_recipe(path).description)
    results.print(table)


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
