"""``compressllm contextual``."""

from __future__ import annotations

from typing import Annotated

import typer

from compressllm.cli.arguments import AsJson, Backend, Device, DType, Model, Out, Resume, Seed
from compressllm.cli.output import flag, given
from compressllm.cli.running import run_and_print
from compressllm.contextual.config import ContextualConfig


def contextual(
    model: Model,
    out: Out,
    selector: Annotated[str | None, flag(ContextualConfig, "selector")] = None,
    density: Annotated[float | None, flag(ContextualConfig, "density")] = None,
    curve: Annotated[list[float] | None, flag(ContextualConfig, "curve", "May be repeated.")] = None,
    correct: Annotated[str | None, flag(ContextualConfig, "correct", "none corrects nothing.")] = None,
    skip_first: Annotated[int | None, flag(ContextualConfig, "skip_first")] = None,
    skip_last: Annotated[int | None, flag(ContextualConfig, "skip_last")] = None,
    calibration: Annotated[str | None, typer.Option(help="Text to calibrate on.")] = None,
    data: Annotated[str | None, flag(ContextualConfig, "source")] = None,
    windows: Annotated[int | None, flag(ContextualConfig, "windows")] = None,
    seqlen: Annotated[int | None, flag(ContextualConfig, "seqlen")] = None,
    prompt_tokens: Annotated[int | None, flag(ContextualConfig, "prompt_tokens")] = None,
    new_tokens: Annotated[int | None, flag(ContextualConfig, "new_tokens")] = None,
    probes: Annotated[int | None, flag(ContextualConfig, "probes")] = None,
    seed: Seed = 0,
    dtype: DType = None,
    device: Device = None,
    backend: Backend = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Calibrate the choice of neurons, and measure what few of them cost. OUT/model carries the calibration."""
    from compressllm.stages.recipe import make_recipe, method_spec

    settings = given(
        selector=method_spec(selector),
        density=density,
        curve=curve,
        correct=method_spec(correct),
        skip_first=skip_first,
        skip_last=skip_last,
        source=data,
        windows=windows,
        seqlen=seqlen,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        probes=probes,
        dtype=dtype,
        device=device,
        backend=backend,
    )
    if correct == "none":
        settings["correct"] = None
    if calibration is not None:
        default = ContextualConfig().calibration
        settings["calibration"] = {"source": calibration, "samples": default.samples, "seqlen": default.seqlen}
    recipe = make_recipe({"model": model, "seed": seed, "stages": [{"contextual": settings}]})
    run_and_print(recipe, out, resume, as_json)
