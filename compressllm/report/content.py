"""All sections of a run's report, from what its folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compressllm.bench.plot import Bar, bars_svg
from compressllm.report.answers import answers_section
from compressllm.report.layers import layer_sections
from compressllm.report.record import RunRecord
from compressllm.report.section import Picture, Section, Table
from compressllm.report.selecting import selection_section
from compressllm.report.summary import summary
from compressllm.report.tradeoff import tradeoff_sections
from compressllm.report.training import training_section
from compressllm.report.wording import number, percent, size
from compressllm.stages.curve import sweep_svg


def report_title(record: RunRecord) -> str:
    """The heading of a report."""
    return f"compressllm: {record.name}"


def sections_of(record: RunRecord) -> list[Section]:
    """What there is to tell of a run; what it did not do has no section."""
    found = [summary(record)] if record.stages or record.sweep is None else []
    if record.sweep and record.sweep.get("points"):
        found.append(_sweep(record.sweep))
    found += answers_section(record.stages)
    found += layer_sections(record.stages)
    found += tradeoff_sections(record.stages)
    found += [training_section(at + 1, record.stages[at], rows) for at, rows in record.training.items() if rows]
    found += [_bench(name, bench) for name, bench in record.benches.items()]
    found += [selection_section(name, selection) for name, selection in record.selections.items()]
    if warnings := [f"{stage['stage']}: {one}" for stage in record.stages for one in stage["warnings"]]:
        found.append(Section("Warnings", warnings))
    if record.recipe:
        words = [
            "Every setting, defaults included; `compressllm run FILE OUT` on the same versions does the same again."
        ]
        found.append(Section("Recipe", words, code=record.recipe))
    return [*found, *_hashes(record.stages), _environment(record.manifest.get("environment", {}))]


def _sweep(sweep: Mapping[str, Any]) -> Section:
    points, knee = sweep["points"], sweep.get("knee") or {}
    rows = [(p["pattern"], percent(p["sparsity"]), number(p["perplexity"]), number(p["nll"])) for p in points]
    words = [
        f"Knee by {kind}: {point['pattern']}, {percent(point['sparsity'])} removed, "
        f"perplexity {number(point['perplexity'])}."
        for kind, point in knee.items()
        if isinstance(point, Mapping)
    ]
    words += [f"Perplexity: {sweep['protocol']['protocol']}."] if "protocol" in sweep else []
    picture = Picture(sweep_svg(points, knee, "Perplexity against sparsity"), wide=True)
    table = Table("Points of the sweep", ("pattern", "sparsity", "perplexity", "loss"), rows)
    return Section("Sweep", words, pictures=[picture], tables=[table])


def _bench(name: str, bench: Mapping[str, Any]) -> Section:
    rows: Sequence[Mapping[str, Any]] = [*bench["rows"], *bench.get("dense", [])]
    keys = [key for key, value in rows[0].items() if isinstance(value, int | float | str | list)]
    table = Table(
        f"Rows of {name}", [key.replace("_", " ") for key in keys], [[_listed(r.get(k)) for k in keys] for r in rows]
    )
    title, unit, bars = _bars(bench)
    pictures = [Picture(bars_svg(bars, title, unit), wide=True)] if bars else []
    words = [f"Made by: {bench['command']}."] if "command" in bench else []
    return Section(f"Speed: {name}", words, pictures=pictures, tables=[table])


def _bars(bench: Mapping[str, Any]) -> tuple[str, str, list[Bar]]:
    """Of whole models decoding, or of single linears with as few tokens as were measured; dense ones are pale."""
    rows, dense = bench["rows"], bench.get("dense", [])
    bars = []
    if "decode_tokens_per_second" in rows[0]:
        for row in rows:
            step, batch = row["seconds_per_step"], row["batch"]
            ends, value = (batch / step["high"], batch / step["low"]), row["decode_tokens_per_second"]
            label = ", ".join([row["backend"], f"batch {batch}", *([row["step"]] if "step" in row else [])])
            bars.append(Bar(label, value, *ends, row["backend"] == "dense"))
        return "Decoding", "tokens a second", bars
    linears = [row for row in [*rows, *dense] if {"shape", "tokens", "format", "backend", "speedup"} <= row.keys()]
    fewest = min((row["tokens"] for row in linears), default=0)
    for row in sorted(linears, key=lambda row: row["shape"]):
        if row["tokens"] == fewest:
            label = f"{'x'.join(map(str, row['shape']))} {row['format']} {row['backend']}"
            value = row["speedup"]
            bars.append(Bar(label, value, value, value, row in dense))
    return f"Single linears, tokens at a time: {fewest}", "times as fast as torch's bfloat16 linear", bars


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else number(value)


def _hashes(stages: Sequence[Mapping[str, Any]]) -> list[Section]:
    rows = [(stage["stage"], file, sha) for stage in stages for file, sha in stage["sha256"].items()]
    rows += [(s["stage"], "masks", s["metrics"]["masks_sha256"]) for s in stages if s["metrics"].get("masks_sha256")]
    return [Section("Files", tables=[Table("SHA-256", ("stage", "what", "SHA-256"), rows)])] if rows else []


def _environment(environment: Mapping[str, Any]) -> Section:
    rows = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}", str(version)) for name, version in value.items()]
        elif value is not None:
            shown = size(value) if key.endswith("_bytes") else value if isinstance(value, str) else json.dumps(value)
            rows.append((key.removesuffix("_bytes").replace("_", " "), shown))
    return Section("Environment", tables=[Table("Where it ran", ("what", "value"), rows)])
