"""The ``compressllm`` command: one file a subcommand, each a thin layer over the Python API."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from compressllm.cli import evaluate, export, generate, inspection, listing, permute, prune, recipe, run
from compressllm.cli.output import say
from compressllm.core.errors import CompressError

app = typer.Typer(
    name="compressllm",
    help="Make a Hugging Face LLM smaller and faster after training, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run.run)
app.command()(permute.permute)
app.command()(prune.prune)
app.command()(export.export)
app.command(name="eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command(name="inspect")(inspection.inspect)
app.command()(inspection.verify)
app.command(name="list")(listing.list_methods)
app.add_typer(recipe.app, name="recipe")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(installed_version("compressllm"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make a Hugging Face LLM smaller and faster after training, and prove it."""


def main() -> None:
    """Run the command line. Exits 0 when all went well, 1 when a gate failed, 2 for bad usage or input."""
    if int(os.environ.get("RANK", "0")) > 0:
        return  # started by a launcher with several processes: the first does the work
    try:
        app()
    except CompressError as error:
        say(f"error: {error}", style="bold red")
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"error: {where}{error.strerror or error}; finished work is kept, the same command resumes it", style="red")
        sys.exit(2)
