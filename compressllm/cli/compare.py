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
    max_acc_drop: Annotated[
        float | None, typer.Option(min=0, max=100, help="Fail if an accuracy fell by more points of 100, as in 0.5.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="With which a change has to be beyond that, to fail.")] = 0.95,
    junit: Annotated[Path | None, typer.Option(help="Also write the gate's result as JUnit XML.")] = None,
    annotate: Annotated[
        bool | None, typer.Option(help="Print ::error lines for GitHub, by default where GITHUB_ACTIONS is true.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side, and fail if perplexity rose or accuracy fell beyond chance and what is allowed."""
    from compressllm.eval.gate import parse_increase
    from compressllm.report.ci import github_lines, judgements, to_junit
    from compressllm.report.compare import compare as compare_all
    from compressllm.report.contender import read_contender

    if len(what) < 2:
        raise RecipeError(f"compare {what[0]}: needs another one to compare it with")
    if not 0.5 < confidence < 1.0:
        raise RecipeError(f"--confidence {confidence:g}: give a share above 0.5 and below 1, as 0.95")
    if junit and max_ppl_increase is None and max_acc_drop is None:
        raise RecipeError("--junit writes what a gate says; give --max-ppl-increase or --max-acc-drop too")
    allowed = None if max_ppl_increase is None else parse_increase(max_ppl_increase, "--max-ppl-increase")
    drop = None if max_acc_drop is None else max_acc_drop / 100
    comparison = compare_all([read_contender(name) for name in what], allowed, confidence, drop)
    if as_json:
        print_json(
            {
                "rows": [line.as_json() for line in comparison.lines],
                "protocol": comparison.protocol,
                "allowed": allowed,
                "allowed_drop": drop,
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
    styles = {"failed": "bold red", "passed": "green", "within noise": "yellow"}
    for one in judgements(comparison):
        say(f"gate: {one.sentence}", style=styles[one.verdict])
    if comparison.failed:
        raise typer.Exit(1)


def _print(comparison: Comparison) -> None:
    bounds = f"{comparison.confidence:.0%} bounds"
    table = Table("", "perplexity", "change", bounds, "sparsity", "weights", "time", box=None)
    for line in comparison.lines:
        facts = line.facts
        table.add_row(
            escape(line.name),
            f"{line.perplexity:.4f}" if line.perplexity is not None else "",
            f"{line.rise.value:+.2%}" if line.rise else "",
            f"{line.rise.low:+.2%} to {line.rise.high:+.2%}" if line.rise and line.paired else "",
            f"{facts['sparsity']:.4f}" if "sparsity" in facts else "",
            bytes_text(facts["bytes_after"]) if "bytes_after" in facts else "",
            seconds_text(facts["seconds"]) if "seconds" in facts else "",
        )
    results.print(table)
    if comparison.protocol:
        results.print(f"perplexity: {comparison.protocol}", soft_wrap=True, markup=False)
    if comparison.lines[0].accuracies:
        results.print(_accuracies(comparison))


def _accuracies(comparison: Comparison) -> Table:
    """A row a task and contender, in percent and points of it."""
    table = Table("task", "", "accuracy", "change", "bounds", box=None)
    for at, first in enumerate(comparison.lines[0].accuracies):
        for line in comparison.lines:
            one = line.accuracies[at]
            error = f" ± {100 * one.stderr:.2f}" if one.stderr is not None else ""
            table.add_row(
                escape(f"{one.task} {one.metric}".rstrip()) if one is first else "",
                escape(line.name),
                f"{100 * one.value:.2f}{error}",
                f"{-100 * one.drop.value:+.2f}" if one.drop else "",
                f"{-100 * one.drop.high:+.2f} to {-100 * one.drop.low:+.2f}" if one.drop else "",
            )
    return table
