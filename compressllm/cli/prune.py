"""``compressllm prune``."""

from __future__ import annotations

from typing import Annotated

import typer

from compressllm.calibration.config import CalibrationConfig
from compressllm.cli.arguments import AsJson, Data, Device, DType, Model, Out, Resume, Seed
from compressllm.cli.output import flag, given
from compressllm.cli.running import run_and_print
from compressllm.prune.config import PruneConfig


def prune(
    model: Model,
    out: Out,
    method: Annotated[str | None, flag(PruneConfig, "method")] = None,
    pattern: Annotated[str | None, flag(PruneConfig, "pattern")] = None,
    masks: Annotated[str | None, flag(PruneConfig, "masks")] = None,
    gather: Annotated[str | None, flag(PruneConfig, "gather")] = None,
    reconstruct: Annotated[str | None, flag(PruneConfig, "reconstruct")] = None,
    data: Data = None,
    samples: Annotated[int | None, flag(CalibrationConfig, "samples")] = None,
    seqlen: Annotated[int | None, flag(CalibrationConfig, "seqlen")] = None,
    seed: Seed = 0,
    allocation: Annotated[str | None, flag(PruneConfig, "allocation")] = None,
    patterns: Annotated[
        list[str] | None,
        typer.Option("--layer-pattern", help="GLOB=PATTERN or GLOB=dense, for some linears. May be repeated."),
    ] = None,
    skip: Annotated[list[str] | None, flag(PruneConfig, "skip", "May be repeated.")] = None,
    order: Annotated[str | None, flag(PruneConfig, "order")] = None,
    dtype: DType = None,
    device: Device = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint in one shot. The pruned model is OUT/model."""
    from compressllm.stages.recipe import make_recipe, method_spec, switch_or_mapping

    settings = given(method=method_spec(method), pattern=pattern, masks=masks, skip=skip, order=order)
    settings |= given(allocation=method_spec(allocation), patterns=_by_glob(patterns) or None)
    settings |= given(gather=switch_or_mapping(gather, "--gather"))
    settings |= given(reconstruct=switch_or_mapping(reconstruct, "--reconstruct"), dtype=dtype, device=device)
    settings["calibration"] = given(source=data, samples=samples, seqlen=seqlen)
    recipe = make_recipe({"model": model, "seed": seed, "stages": [{"prune": settings}]})
    run_and_print(recipe, out, resume, as_json)


def _by_glob(texts: list[str] | None) -> dict[str, str]:
    from compressllm.core.errors import RecipeError

    parts = [text.rpartition("=") for text in texts or ()]
    for glob, _, pattern in parts:
        if not glob:
            raise RecipeError(f"--layer-pattern {pattern}: write GLOB=PATTERN, as in '*.down_proj=4:8'")
    return {glob: pattern for glob, _, pattern in parts}
