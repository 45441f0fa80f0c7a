"""``compressllm kernels``."""

from __future__ import annotations

from typing import Any

import typer

from compressllm.cli.arguments import AsJson
from compressllm.cli.output import print_json, results, say

app = typer.Typer(help="Build the native CPU kernels, or show what runs here.", no_args_is_help=True)


@app.command()
def build() -> None:
    """Compile the kernels now rather than on first use, and print where. Fails if they cannot be."""
    from compressllm.kernels.native.library import library

    built = library().build
    say(f"built in {built.seconds} s by {built.compiler}")
    results.print(str(built.library), soft_wrap=True)


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show the compiler, the compiled library, its instruction sets, the one chosen here, and why not others."""
    from compressllm.kernels.native.report import report

    facts = report()
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        lines = [f"{key}: {one}" for key, one in value.items()] if isinstance(value, dict) else [_text(value)]
        for label, line in zip([name.replace("_", " "), *[""] * len(lines)], lines, strict=False):
            results.print(f"{label:<26}{line}", markup=False, soft_wrap=True)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
