"""``compressllm compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from compressllm.cli.arguments import AsJson
from compressllm.cli.output import bytes_text, print_json, results, say, seconds_text, warn
from compressllm.core.errors import RecipeError

if TYPE_CHECKING:
    from compressllm.report.compare import Comparison


def compare(
    what: Annotated[list[str], typer.Argument(help="Run folders, or files of eval --json; the first is the measure.")],
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Fail with exit code 1 if perplexity rose by more, as in 2%.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="With which a rise has to be beyond that, to fail.")] = 0.95,
    junit: Annotated[Path | None, typer.Option(help="Also write the gate's result as JUnit XML.")] = None,
    annotate: Annotated[
        bool | None, typer.Option(help="Print ::error lines for GitHub, by default where GITHUB_ACTIONS is true.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side, and fail if perplexity rose beyond chance and what is allowed."""
    from compressllm.eval.gate import parse_increase
    from compressllm.report.ci import github_lines, sentence, to_junit
    from compressllm.report.compare import compare as compare_all
    from compressllm.report.compare import read_contender

    if len(what) < 2:
        raise RecipeError(f"compare {what[0]}: needs another one to compare it with")
    if not 0.5 < confidence < 1.0:
        raise RecipeError(f"--confidence {confidence:g}: give a share above 0.5 and below 1, as 0.95")
    if junit and max_ppl_increase is None:
        raise RecipeError("--junit writes what a gate says; give --max-ppl-increase too")
    allowed = None if max_ppl_increase is None else parse_increase(max_ppl_increase, "--max-ppl-increase")
    comparison = compare_all([read_contender(name) for name in what], allowed, confidence)
    if as_json:
        print_json(
            {
                "rows": [line.as_json() for line in comparison.lines],
                "protocol": comparison.protocol,
                "allowed": allowed,
                "confidence": confidence,
                "warnings": comparison.warnings,
                "failed": bool(comparison.failed),
            }
        )
    else:
        _print(comparison)
    for warning in comparison.warnings:
        warn(warning)
    if junit:
        junit.write_text(to_junit(comparison))
    if os.environ.get("GITHUB_ACTIONS") == "true" if annotate is None else annotate:
        for note in github_lines(comparison):
            typer.echo(note, err=True)
    if allowed is not None:
        for line in comparison.lines[1:]:
            style = {"failed": "bold red", "passed": "green"}.get(line.verdict or "", "yellow")
            say(f"gate: {sentence(comparison, line)}", style=style)
    if comparison.failed:
        raise typer.Exit(1)


def _print(comparison: Comparison) -> None:
    table = Table(
        "", "perplexity", "change", f"{comparison.confidence:.0%} bounds", "sparsity", "weights", "time", box=None
    )
    for line in comparison.lines:
        facts = line.facts
        table.add_row(
            escape(line.name),
            f"{line.perplexity:.4f}",
            f"{line.rise.value:+.2%}" if line.rise else "",
            f"{line.rise.low:+.2%} to {line.rise.high:+.2%}" if line.rise and line.paired else "",
            f"{facts['sparsity']:.4f}" if "sparsity" in facts else "",
            bytes_text(facts["bytes_after"]) if "bytes_after" in facts else "",
            seconds_text(facts["seconds"]) if "seconds" in facts else "",
        )
    results.print(table)
    results.print(f"perplexity: {comparison.protocol}", soft_wrap=True, markup=False)
