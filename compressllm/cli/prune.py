"""``compressllm prune``."""

from __future__ import annotations

from typing import Annotated

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
    reconstruct: Annotated[str | None, flag(PruneConfig, "reconstruct")] = None,
    data: Data = None,
    samples: Annotated[int | None, flag(CalibrationConfig, "samples")] = None,
    seqlen: Annotated[int | None, flag(CalibrationConfig, "seqlen")] = None,
    seed: Seed = 0,
    skip: Annotated[list[str] | None, flag(PruneConfig, "skip", "May be repeated.")] = None,
    dtype: DType = None,
    device: Device = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint in one shot. The pruned model is OUT/model."""
    from compressllm.stages.recipe import make_recipe, method_spec, switch_or_mapping

    settings = given(method=method_spec(method), pattern=pattern, skip=skip, dtype=dtype, device=device)
    settings |= given(reconstruct=switch_or_mapping(reconstruct, "--reconstruct"))
    settings["calibration"] = given(source=data, samples=samples, seqlen=seqlen)
    recipe = make_recipe({"model": model, "seed": seed, "stages": [{"prune": settings}]})
    run_and_print(recipe, out, resume, as_json)
