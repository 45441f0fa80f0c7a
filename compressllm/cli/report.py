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
    against: Annotated[
        list[str] | None,
        typer.Option(help="Put it beside this run or file of eval --json; may be repeated, the first is the measure."),
    ] = None,
) -> None:
    """Show what a run did: summary, layers, curves, recipe and environment, on one page."""
    from compressllm.report.beside import beside_section
    from compressllm.report.compare import compare
    from compressllm.report.contender import read_contender
    from compressllm.report.content import report_title, sections_of
    from compressllm.report.html import to_html
    from compressllm.report.markdown import to_markdown
    from compressllm.report.record import read_run

    if html is None and md is None:
        raise RecipeError("report writes a file: give --html FILE, --md FILE, or both")
    record = read_run(run)
    title, sections = report_title(record), sections_of(record)
    if against:
        sections.insert(1, beside_section(compare([read_contender(name) for name in (*against, str(run))])))
    for path, text in ((html, to_html), (md, to_markdown)):
        if path:
            path.write_text(text(title, sections))
            results.print(str(path), soft_wrap=True, markup=False)
