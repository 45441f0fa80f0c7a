"""``compressllm sweep``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from compressllm.calibration.config import CalibrationConfig
from compressllm.cli.arguments import AsJson, Device, DType, Model, Out, Seed
from compressllm.cli.output import flag, given, print_json, results, seconds_text, show, warn
from compressllm.cli.stopping import keeping
from compressllm.eval.config import EvalConfig
from compressllm.stages.sweepconfig import SweepConfig


def sweep(
    model: Model,
    out: Out,
    sparsities: Annotated[
        str,
        typer.Option(help="FIRST:LAST:STEP, or a comma list with N:M among them, as in 0.3,2:4. Dense is always in."),
    ] = "0:0.9:0.1",
    method: Annotated[str | None, flag(SweepConfig, "method")] = None,
    group: Annotated[
        str | None,
        typer.Option("--pattern-group", help="Where scores compete: row, layer, or model (magnitude's default)."),
    ] = None,
    allocation: Annotated[str | None, flag(SweepConfig, "allocation")] = None,
    skip: Annotated[list[str] | None, flag(SweepConfig, "skip", "May be repeated.")] = None,
    data: Annotated[str | None, flag(EvalConfig, "source", "What perplexity is measured on.")] = None,
    seqlen: Annotated[int | None, flag(EvalConfig, "seqlen")] = None,
    windows: Annotated[int | None, flag(EvalConfig, "windows")] = None,
    calibration_data: Annotated[str | None, flag(CalibrationConfig, "source", "For methods that look at text.")] = None,
    calibration_samples: Annotated[int | None, flag(CalibrationConfig, "samples")] = None,
    calibration_seqlen: Annotated[int | None, flag(CalibrationConfig, "seqlen")] = None,
    rise: Annotated[float | None, flag(SweepConfig, "rise")] = None,
    seed: Seed = 0,
    dtype: DType = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity against sparsity, and find the knee. The curve is OUT/sweep.svg."""
    from compressllm.stages.recipe import make_config, method_spec
    from compressllm.stages.sweep import CURVE, RESULT, sweep_model

    fields = given(method=method_spec(method), group=group, allocation=method_spec(allocation), skip=skip)
    fields |= {
        "points": sparsities,
        "calibration": given(source=calibration_data, samples=calibration_samples, seqlen=calibration_seqlen),
        "evaluation": {
            **given(source=data, seqlen=seqlen, windows=windows, dtype=dtype, device=device),
            "backend": "dense",
        },
        **given(rise=rise),
    }
    config = make_config(SweepConfig, fields)
    with keeping(f"finished points are in {out}"):
        result = sweep_model(model, config, out, seed=seed, show=show, on_warning=warn)
    if as_json:
        print_json(result)
        return
    _print_points(result)
    results.print(f"curve: {out / CURVE}\nresult: {out / RESULT}", soft_wrap=True)


def _print_points(result: dict[str, Any]) -> None:
    """One row a point, and the knees below."""
    table = Table("pattern", "sparsity", "perplexity", "rise", "loss", "rise", "seconds", box=None)
    dense = result["points"][0]
    for point in result["points"]:
        table.add_row(
            point["pattern"],
            f"{point['sparsity']:.4f}",
            _perplexity(point),
            _rise(point["perplexity"], dense["perplexity"]),
            f"{point['nll']:.4f}",
            _rise(point["nll"], dense["nll"]),
            seconds_text(point["seconds"]),
        )
    results.print(table)
    results.print(f"perplexity: {result['protocol']['protocol']}", soft_wrap=True)
    knee = result["knee"]
    for kind in ("loss", "perplexity"):
        results.print(
            f"knee by {kind}: {knee[kind]['pattern']}, the sparsest whose {kind} rose by at most {knee['rise']:.2%}",
            soft_wrap=True,
        )
    bend = knee["chord"]
    where = f"{bend['pattern']}, farthest below the chord" if bend else "none, as no point is below the chord"
    results.print(f"knee by distance: {where} of loss from the dense to the sparsest point", soft_wrap=True)


def _perplexity(point: dict[str, Any]) -> str:
    return "beyond range" if point["perplexity"] is None else f"{point['perplexity']:.3f}"


def _rise(value: float | None, dense: float | None) -> str:
    return "" if value is None or dense is None else f"{value / dense - 1:+.2%}"
