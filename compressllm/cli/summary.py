"""The table at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from compressllm.cli.output import bytes_text, results, seconds_text


def print_summary(manifest: dict[str, Any], out: Path) -> None:
    """One row a stage, to stdout."""
    table = Table("stage", "linears", "sparsity", "perplexity", "bytes", "seconds", "peak memory", box=None)
    for stage in manifest["stages"]:
        metrics = stage["metrics"]
        table.add_row(
            _title(stage),
            str(metrics.get("linears", "")),
            f"{metrics['sparsity']:.4f}" if "sparsity" in metrics else "",
            f"{metrics['perplexity']:.3f}" if "perplexity" in metrics else "",
            _bytes(metrics),
            seconds_text(stage["seconds"]),
            bytes_text(stage["peak_memory_bytes"]),
        )
    results.print(table)
    protocols = dict.fromkeys(s["metrics"]["protocol"] for s in manifest["stages"] if "protocol" in s["metrics"])
    for protocol in protocols:
        results.print(f"perplexity: {protocol}", soft_wrap=True)
    for metrics in (stage["metrics"] for stage in manifest["stages"]):
        if "sparse_ratio" in metrics:
            results.print(
                f"{metrics['format']}: {metrics['linears']} sparse linears in {bytes_text(metrics['sparse_bytes'])}, "
                f"{metrics['sparse_ratio']:.4f} of their {bytes_text(metrics['sparse_bytes_dense'])} dense",
                soft_wrap=True,
            )
        if "tradeoff" in metrics:
            _print_tradeoff(metrics["tradeoff"])
        if "held_out_perplexity" in metrics:
            results.print(_recovery(metrics), soft_wrap=True)
        for task, found in metrics.get("tasks", {}).items():
            results.print(f"{task}: {_numbers(found)}", soft_wrap=True, markup=False)
    models = [stage["model"] for stage in manifest["stages"] if stage["model"]]
    if models:
        results.print(f"model: {out / models[-1]}", soft_wrap=True)


def _title(stage: dict[str, Any]) -> str:
    config = stage["config"]
    if stage["stage"] == "prune":
        method = config["method"]
        return f"prune {method if isinstance(method, str) else next(iter(method))} {config['pattern']}"
    if stage["stage"] == "recover":
        return f"recover {config['masking']} {config['losses']}"
    if stage["stage"] == "quantize":
        method = config["method"]
        return f"quantize {method if isinstance(method, str) else next(iter(method))} {config['scheme']}"
    if stage["stage"] == "contextual":
        selector = config["selector"]
        return f"contextual {selector if isinstance(selector, str) else next(iter(selector))}"
    return f"export {config['format']}" if stage["stage"] == "export" else str(stage["stage"])


def _numbers(task: dict[str, Any]) -> str:
    each = (
        f"{name} {found['value']:.4f}" + (f" ± {found['stderr']:.4f}" if found["stderr"] is not None else "")
        for name, found in task["metrics"].items()
    )
    return f"{', '.join(each)}, {task['items']} items, {task['num_fewshot']} shots"


def _print_tradeoff(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "neurons", "density", "effective", "quality", "like dense", "a check", "speed", "perplexity", box=None
    )
    for row in rows:
        keys = ("density", "effective_density", "quality", "similarity", "advance_length", "speed_ratio", "perplexity")
        table.add_row(row["kind"], *("" if row[key] is None else f"{row[key]:.3f}" for key in keys))
    results.print(table)


def _recovery(metrics: dict[str, Any]) -> str:
    measured = metrics["held_out_perplexity"]
    teacher = f", the teacher's {measured['teacher']:.3f}" if "teacher" in measured else ""
    gap = f"; {metrics['gap_closed']:.0%} of the gap closed" if metrics["gap_closed"] is not None else ""
    return (
        f"recover: perplexity on held-out training text {measured['before']:.3f} -> {measured['after']:.3f}{teacher}"
        f"{gap}; {metrics['tokens']} tokens at {metrics['tokens_per_second']:.0f} a second"
    )


def _bytes(metrics: dict[str, Any]) -> str:
    if "bytes_before" not in metrics:
        return ""
    return f"{bytes_text(metrics['bytes_before'])} -> {bytes_text(metrics['bytes_after'])}"
