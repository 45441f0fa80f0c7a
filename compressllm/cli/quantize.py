"""``compressllm quantize``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressllm.calibration.config import CalibrationConfig
from compressllm.cli.arguments import AsJson, Data, Device, DType, Model, Out, Resume, Seed
from compressllm.cli.output import flag, given
from compressllm.cli.running import run_and_print
from compressllm.quantize.config import QuantizeConfig


def quantize(
    model: Model,
    out: Out,
    scheme: Annotated[str | None, flag(QuantizeConfig, "scheme")] = None,
    method: Annotated[str | None, flag(QuantizeConfig, "method")] = None,
    data: Data = None,
    samples: Annotated[int | None, flag(CalibrationConfig, "samples")] = None,
    seqlen: Annotated[int | None, flag(CalibrationConfig, "seqlen")] = None,
    seed: Seed = 0,
    skip: Annotated[list[str] | None, flag(QuantizeConfig, "skip", "May be repeated.")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="How OUT/model is stored: packed, or compressed-tensors for loaders that know that library."),
    ] = None,
    order: Annotated[str | None, flag(QuantizeConfig, "order")] = None,
    dtype: DType = None,
    device: Device = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Round weights to int8, int4 or fp8 without losing the mask. The result is OUT/model."""
    from compressllm.stages.recipe import make_recipe, method_spec

    settings = given(scheme=scheme, method=method_spec(method), skip=skip, order=order, dtype=dtype, device=device)
    settings["calibration"] = given(source=data, samples=samples, seqlen=seqlen)
    stages: list[dict[str, Any]] = [{"quantize": settings}]
    if format not in {None, "packed"}:
        stages.append({"export": {"format": format}})
    recipe = make_recipe({"model": model, "seed": seed, "stages": stages})
    run_and_print(recipe, out, resume, as_json)
