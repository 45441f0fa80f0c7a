"""The head of a report: what a run made of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressllm.eval.gate import comparable
from compressllm.report.answers import answers_card
from compressllm.report.record import RunRecord
from compressllm.report.section import Section, Table
from compressllm.report.wording import arrow, number, percent, seconds, size, stage_title


def summary(record: RunRecord) -> Section:
    """Cards of what changed from the first to the last, and a row a stage."""
    stages = record.stages
    if not stages:
        return Section("Summary", ["No stage of this run is finished."])
    rows = [
        (
            stage_title(stage),
            str(stage["metrics"].get("linears", "—")),
            percent(stage["metrics"]["sparsity"]) if "sparsity" in stage["metrics"] else "—",
            number(stage["metrics"].get("perplexity")),
            size(stage["metrics"].get("bytes_after")),
            seconds(stage["seconds"]),
            size(stage["peak_memory_bytes"]),
        )
        for stage in stages
    ]
    header = ("stage", "linears", "sparsity", "perplexity", "weights", "time", "peak memory")
    words = [f"Model: {record.manifest['model']}. Seed {record.manifest['seed']}, begun {record.manifest['begun']}."]
    if not record.manifest.get("finished"):
        words.append("This run is not finished.")
    words += _protocols(stages)
    return Section("Summary", words, _cards(stages), tables=[Table("The stages, in order", header, rows)])


def _protocols(stages: list[dict[str, Any]]) -> list[str]:
    protocols = dict.fromkeys(stage["metrics"]["protocol"] for stage in stages if "protocol" in stage["metrics"])
    return [f"Perplexity: {protocol}." for protocol in protocols]


def _cards(stages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    cards = []
    metrics = [stage["metrics"] for stage in stages]
    measured = [one for one in metrics if "perplexity" in one]
    if measured:
        before = _comparable_first(measured)
        cards.append(
            ("Perplexity", arrow(number(before["perplexity"]) if before else None, number(measured[-1]["perplexity"])))
        )
        if before:
            cards.append(("Change in perplexity", f"{measured[-1]['perplexity'] / before['perplexity'] - 1:+.2%}"))
    cards += answers_card(stages)
    if schemes := [one["scheme"] for one in metrics if "scheme" in one]:
        cards.append(("Weights rounded to", schemes[-1]))
    sparse = [one["sparsity"] for one in metrics if "sparsity" in one]
    if sparse:
        cards.append(("Sparsity of pruned linears", percent(sparse[-1])))
    sized = [one for one in metrics if "bytes_after" in one]
    if sized:
        cards.append(("Weights on disk", arrow(size(sized[0]["bytes_before"]), size(sized[-1]["bytes_after"]))))
    recovered = [one for one in metrics if "held_out_perplexity" in one]
    if recovered:
        held_out = recovered[-1]["held_out_perplexity"]
        cards.append(("Held-out, in recovery", arrow(number(held_out["before"]), number(held_out["after"]))))
        if recovered[-1].get("gap_closed") is not None:
            cards.append(("Of the gap closed", percent(recovered[-1]["gap_closed"])))
    cards.append(("Time", seconds(sum(stage["seconds"] for stage in stages))))
    cards.append(("Peak memory", size(max(stage["peak_memory_bytes"] for stage in stages))))
    return cards


def _comparable_first(measured: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first measurement of the text that the last one is of, unless it is the last."""
    first = next(one for one in measured if comparable(one, measured[-1]))
    return first if first is not measured[-1] else None
