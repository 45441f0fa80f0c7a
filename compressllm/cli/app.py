"""The ``compressllm`` command: one file a subcommand, each a thin layer over the Python API."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from compressllm.cli import (
    bench,
    compare,
    contextual,
    evaluate,
    export,
    generate,
    inspection,
    kernels,
    listing,
    mergelora,
    permute,
    prune,
    quantize,
    recipe,
    recover,
    report,
    run,
    select,
    soup,
    sweep,
)
from compressllm.cli.output import results, say, talk
from compressllm.cli.refusal import refusal
from compressllm.cli.stopping import Stopped, stopping
from compressllm.core.errors import CompressError

#: Commands whose work the processes of a launcher share.
SHARED = {"prune", "recover", "run"}

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
app.command()(recover.recover)
app.command()(quantize.quantize)
app.command()(contextual.contextual)
app.command()(sweep.sweep)
app.command()(soup.soup)
app.command(name="merge-lora")(mergelora.merge_lora)
app.command()(select.select)
app.command()(export.export)
app.command()(export.convert)
app.command(name="eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command()(bench.bench)
app.command()(report.report)
app.command()(compare.compare)
app.command(name="inspect")(inspection.inspect)
app.command()(inspection.verify)
app.command(name="list")(listing.list_methods)
app.add_typer(recipe.app, name="recipe")
app.add_typer(kernels.app, name="kernels")


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
    """Run the command line.

    Exits 0 when all went well, 1 when a gate failed, 2 for bad usage or input and where the operating system refuses,
    128 and a signal's number when that asked it to stop: 130 for Ctrl-C, 143 for SIGTERM.
    """
    if os.environ.get("RANK", "0") != "0":  # one of several processes of a launcher, and not the first
        if not SHARED & set(sys.argv[1:2]):
            return  # the first does the work
        _hush()
    try:
        with stopping():
            app()
    except Stopped as stopped:
        say(str(stopped), style="yellow")
        sys.exit(stopped.code)
    except CompressError as error:
        talk.quiet = False
        say(f"error: {error}", style="bold red")
        sys.exit(2)
    except OSError as error:
        talk.quiet = False
        say(f"error: {refusal(error)}", style="bold red")
        sys.exit(2)


def _hush() -> None:
    """Leave all talk to the first process. Errors that it cannot know of are still shown."""
    talk.quiet = results.quiet = True
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when those libraries are imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
