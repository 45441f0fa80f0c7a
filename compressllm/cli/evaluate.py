"""``compressllm eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from compressllm.cli.arguments import AsJson, Backend, Device, DType, KeepDense, Model
from compressllm.cli.output import flag, given, print_json, results, say, show, warn
from compressllm.core.errors import RecipeError
from compressllm.eval.config import EvalConfig


def evaluate(
    model: Model,
    data: Annotated[str | None, flag(EvalConfig, "source")] = None,
    seqlen: Annotated[int | None, flag(EvalConfig, "seqlen")] = None,
    windows: Annotated[int | None, flag(EvalConfig, "windows")] = None,
    parent: Annotated[str | None, flag(EvalConfig, "parent")] = None,
    tasks: Annotated[str | None, flag(EvalConfig, "tasks", "With commas between them.", names=("-t",))] = None,
    task_files: Annotated[list[str] | None, flag(EvalConfig, "task_files", names=("--task_files",))] = None,
    num_fewshot: Annotated[int | None, flag(EvalConfig, "num_fewshot", names=("-f",))] = None,
    limit: Annotated[float | None, flag(EvalConfig, "limit", names=("-L",))] = None,
    batch_size: Annotated[str | None, flag(EvalConfig, "batch_size", names=("-b",))] = None,
    apply_chat_template: Annotated[
        bool, flag(EvalConfig, "apply_chat_template", names=("--apply_chat_template",))
    ] = False,
    dtype: DType = None,
    device: Device = None,
    backend: Backend = None,
    keep_dense: KeepDense = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Fail with exit code 1 if perplexity rose over this file's.")
    ] = None,
    max_increase: Annotated[str, typer.Option(help="Largest rise the gate lets pass.")] = "1%",
    write_baseline: Annotated[Path | None, typer.Option(help="Put the result into this baseline file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity under the papers' protocol and accuracy on tasks, and hold perplexity against a baseline."""
    from compressllm.core.run import Run
    from compressllm.eval.gate import find_baseline, judge, parse_increase, read_baseline, rise_between
    from compressllm.eval.gate import write_baseline as save_baseline
    from compressllm.models.bundle import open_bundle
    from compressllm.stages.evaluate import measure
    from compressllm.stages.recipe import make_config

    allowed = parse_increase(max_increase)
    if baseline:
        read_baseline(baseline)  # not after the work
    config = make_config(
        EvalConfig,
        given(
            source=data,
            seqlen=seqlen,
            windows=windows,
            parent=parent,
            tasks=tasks.split(",") if tasks else None,
            task_files=task_files,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            dtype=dtype,
            device=device,
            backend=backend,
            keep_dense=keep_dense,
        ),
    )
    if (baseline or write_baseline) and config.text is None:
        raise RecipeError("a baseline is of perplexity, and with --tasks alone there is none; give --data too")
    measured: dict[str, Any] = measure(open_bundle(model), config, Run(show=show, on_warning=warn))
    measured = {"model": model, **measured}
    verdict = None
    if baseline:
        before = find_baseline(baseline, measured)
        rise, paired = rise_between(before, measured)
        verdict = judge(rise, allowed)
        measured["baseline"] = {
            "perplexity": before["perplexity"],
            "increase": rise.value,
            "low": rise.low,
            "high": rise.high,
            "paired": paired,
            "allowed": allowed,
            "verdict": verdict,
            "failed": verdict == "failed",
        }
    if as_json:
        print_json(measured)
    else:
        _print(measured)
    if verdict:
        style = {"failed": "bold red", "passed": "green", "within noise": "yellow"}[verdict]
        bounds = f", at 95% between {rise.low:+.2%} and {rise.high:+.2%}" if paired else ""
        say(
            f"gate {verdict.upper() if verdict == 'failed' else verdict}: {measured['perplexity']:.4f} against "
            f"{before['perplexity']:.4f}, {rise.value:+.2%}{bounds} where {allowed:.2%} is allowed",
            style=style,
        )
    if write_baseline:
        save_baseline(write_baseline, {k: v for k, v in measured.items() if k != "baseline"})
    if verdict == "failed":
        raise typer.Exit(1)


def _print(measured: dict[str, Any]) -> None:
    if "perplexity" in measured:
        results.print(f"perplexity {measured['perplexity']:.4f}", style="bold")
        results.print(measured["protocol"], soft_wrap=True)
    if agreement := measured.get("agreement"):
        results.print(
            f"agreement with {agreement['parent']}: next token {agreement['next_token']:.4f}, "
            f"same prefix {agreement['same_prefix']:.1f} of {agreement['new_tokens']} tokens",
            soft_wrap=True,
            markup=False,
        )
    if "tasks" in measured:
        table = Table("task", "metric", "value", "stderr", "items", "shots", box=None)
        for name, task in measured["tasks"].items():
            for metric, found in task["metrics"].items():
                stderr = f"{found['stderr']:.4f}" if found["stderr"] is not None else ""
                table.add_row(
                    escape(name), escape(metric), f"{found['value']:.4f}", stderr, str(task["items"]),
                    str(task["num_fewshot"]),
                )  # fmt: skip
        results.print(table)
