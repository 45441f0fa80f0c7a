"""``compressllm permute``."""

from __future__ import annotations

from typing import Annotated

from compressllm.calibration.config import CalibrationConfig
from compressllm.cli.arguments import AsJson, Data, Device, DType, Model, Out, Resume, Seed
from compressllm.cli.output import flag, given
from compressllm.cli.running import run_and_print
from compressllm.prune.config import PermuteConfig


def permute(
    model: Model,
    out: Out,
    pattern: Annotated[str | None, flag(PermuteConfig, "pattern")] = None,
    score: Annotated[str | None, flag(PermuteConfig, "score")] = None,
    scope: Annotated[list[str] | None, flag(PermuteConfig, "scope", "May be repeated.")] = None,
    rounds: Annotated[int | None, flag(PermuteConfig, "rounds")] = None,
    rows: Annotated[int | None, flag(PermuteConfig, "rows")] = None,
    data: Data = None,
    samples: Annotated[int | None, flag(CalibrationConfig, "samples")] = None,
    seqlen: Annotated[int | None, flag(CalibrationConfig, "seqlen")] = None,
    seed: Seed = 0,
    dtype: DType = None,
    device: Device = None,
    resume: Resume = True,
    as_json: AsJson = False,
) -> None:
    """Reorder channels so that a later N:M prune keeps more. The model OUT/model computes the same as before."""
    from compressllm.stages.recipe import make_recipe, method_spec

    settings = given(
        pattern=pattern,
        score=method_spec(score),
        scope=scope,
        rounds=rounds,
        rows=rows,
        dtype=dtype,
        device=device,
    )
    settings["calibration"] = given(source=data, samples=samples, seqlen=seqlen)
    recipe = make_recipe({"model": model, "seed": seed, "stages": [{"permute": settings}]})
    run_and_print(recipe, out, resume, as_json)
