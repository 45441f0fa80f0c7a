"""``compressllm list``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from compressllm.cli.arguments import AsJson
from compressllm.cli.output import print_json, results


def list_methods(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="pruners, quantizers, allocators, adapters, formats, sources, backends, selectors, embedders; all of "
            "them without."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods of one kind, or of every kind."""
    from compressllm.core.errors import RecipeError
    from compressllm.core.protocols import REGISTRIES
    from compressllm.core.registry import did_you_mean

    if kind is not None and kind not in REGISTRIES:
        raise RecipeError(f"nothing is called {kind!r}{did_you_mean(kind, REGISTRIES)} Known: {', '.join(REGISTRIES)}")
    chosen = {kind: REGISTRIES[kind]} if kind else REGISTRIES
    if as_json:
        print_json({name: {entry: r.summary(entry) for entry in r.names()} for name, r in chosen.items()})
        return
    for name, registry in chosen.items():
        table = Table(title=None if kind else name, title_justify="left", show_header=False, box=None)
        for entry in registry.names():
            table.add_row(entry, registry.summary(entry))
        results.print(table)
