"""``compressllm eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compressllm.cli.arguments import AsJson, Backend, Data, Device, DType, KeepDense, Model
from compressllm.cli.output import flag, given, print_json, results, say, show, warn
from compressllm.eval.config import EvalConfig


def evaluate(
    model: Model,
    data: Data = None,
    seqlen: Annotated[int | None, flag(EvalConfig, "seqlen")] = None,
    windows: Annotated[int | None, flag(EvalConfig, "windows")] = None,
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
    """Measure perplexity under the papers' protocol, and hold it against a baseline."""
    from compressllm.core.run import Run
    from compressllm.eval.gate import find_baseline, increase, parse_increase, read_baseline
    from compressllm.eval.gate import write_baseline as save_baseline
    from compressllm.models.bundle import open_bundle
    from compressllm.stages.evaluate import measure
    from compressllm.stages.recipe import make_config

    allowed = parse_increase(max_increase)
    if baseline:
        read_baseline(baseline)  # not after the work
    flags = given(
        source=data, seqlen=seqlen, windows=windows, dtype=dtype, device=device, backend=backend, keep_dense=keep_dense
    )
    config = make_config(EvalConfig, flags)
    measured: dict[str, Any] = measure(open_bundle(model), config, Run(show=show, on_warning=warn))
    measured = {"model": model, **measured}
    failed = False
    if baseline:
        before = find_baseline(baseline, measured)
        rise = increase(before, measured)
        failed = rise > allowed
        measured["baseline"] = {
            "perplexity": before["perplexity"],
            "increase": rise,
            "allowed": allowed,
            "failed": failed,
        }
    if as_json:
        print_json(measured)
    else:
        results.print(f"perplexity {measured['perplexity']:.4f}", style="bold")
        results.print(measured["protocol"], soft_wrap=True)
    if baseline:
        verdict = "FAILED" if failed else "passed"
        say(
            f"gate {verdict}: {measured['perplexity']:.4f} against {before['perplexity']:.4f}, "
            f"{rise:+.2%} where {allowed:.2%} is allowed",
            style="bold red" if failed else "green",
        )
    if write_baseline:
        save_baseline(write_baseline, {k: v for k, v in measured.items() if k != "baseline"})
    if failed:
        raise typer.Exit(1)
