"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressllm.calibration.config import CalibrationConfig
from compressllm.cli.output import flag
from compressllm.eval.config import EvalConfig

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, run folder, packed export, or demo.")]
Out = Annotated[Path, typer.Argument(help="New folder for the results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted run of the same recipe.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same masks, bit for bit.")]
DType = Annotated[str | None, flag(EvalConfig, "dtype")]
Device = Annotated[str | None, flag(EvalConfig, "device")]
Data = Annotated[str | None, flag(CalibrationConfig, "source")]
Backend = Annotated[str | None, flag(EvalConfig, "backend")]
KeepDense = Annotated[bool | None, flag(EvalConfig, "keep_dense")]
