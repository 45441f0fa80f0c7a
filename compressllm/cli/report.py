"""``compressllm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressllm.cli.output import results
from compressllm.core.errors import RecipeError


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, or a sweep's.")],
    html: Annotated[Path | None, typer.Option(help="Write one HTML file that needs nothing else.")] = None,
    md: Annotated[Path | None, typer.Option(help="Write Markdown: the same words and tables, no pictures.")] = None,
) -> None:
    """Show what a run did: summary, layers, curves, recipe and environment, on one page."""
    from compressllm.report.content import report_title, sections_of
    from compressllm.report.html import to_html
    from compressllm.report.markdown import to_markdown
    from compressllm.report.record import read_run

    if html is None and md is None:
        raise RecipeError("report writes a file: give --html FILE, --md FILE, or both")
    record = read_run(run)
    title, sections = report_title(record), sections_of(record)
    for path, text in ((html, to_html), (md, to_markdown)):
        if path:
            path.write_text(text(title, sections))
            results.print(str(path), soft_wrap=True, markup=False)
