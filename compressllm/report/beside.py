"""A run beside others: the comparison as a section of its page."""

from __future__ import annotations

from compressllm.bench.plot import Bar, bars_svg
from compressllm.report.compare import Comparison, Line
from compressllm.report.section import Picture, Section, Table
from compressllm.report.wording import number, percent, seconds, size

_HEADER = ("run", "perplexity", "change", "bounds", "sparsity", "weights", "time", "peak memory")


def beside_section(comparison: Comparison) -> Section:
    """The rows of ``compressllm compare``, with bars where perplexity was compared."""
    first = comparison.lines[0]
    words = [f"All are held against the first, {first.name}."]
    words += [f"Perplexity: {comparison.protocol}."] if comparison.protocol else []
    bars = [bar for line in comparison.lines if (bar := _bar(line, first))]
    pictures = [Picture(bars_svg(bars, "Perplexity", "lower is better"), wide=True)] if bars else []
    table = Table(
        f"Bounds hold with {comparison.confidence:.0%} each", _HEADER, [_row(one) for one in comparison.lines]
    )
    tables = [table, _accuracies(comparison)] if first.accuracies else [table]
    return Section("Beside other runs", [*words, *comparison.warnings], pictures=pictures, tables=tables)


def _accuracies(comparison: Comparison) -> Table:
    """A row a task and run, in percent and points of it."""
    rows = []
    for line in comparison.lines:
        for one in line.accuracies:
            error = f" ± {100 * one.stderr:.2f}" if one.stderr is not None else ""
            change = f"{-100 * one.drop.value:+.2f}" if one.drop else ""
            bounds = f"{-100 * one.drop.high:+.2f} to {-100 * one.drop.low:+.2f}" if one.drop else ""
            task = f"{one.task} {one.metric}".rstrip()
            rows.append((task, line.name, f"{100 * one.value:.2f}{error}", change, bounds))
    return Table("Accuracies, in percent", ("task", "run", "accuracy", "change", "bounds"), rows)


def _row(line: Line) -> list[str]:
    facts, rise = line.facts, line.rise
    return [
        line.name,
        number(line.perplexity),
        f"{rise.value:+.2%}" if rise else "",
        f"{rise.low:+.2%} to {rise.high:+.2%}" if rise and line.paired else "",
        percent(facts["sparsity"]) if "sparsity" in facts else "—",
        size(facts.get("bytes_after")),
        seconds(facts["seconds"]) if "seconds" in facts else "—",
        size(facts.get("peak_memory_bytes")),
    ]


def _bar(line: Line, first: Line) -> Bar | None:
    """From zero, with the bounds that its rise over the first gives it."""
    value, base = line.perplexity, first.perplexity
    if not value or not base:
        return None
    low, high = (base * (1 + bound) for bound in (line.rise.low, line.rise.high)) if line.rise else (value, value)
    return Bar(line.name, value, low, high, line is first)
