"""Run a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressllm.calibration.source import open_source
from compressllm.core.config import Config
from compressllm.core.errors import OutOfMemoryError
from compressllm.core.ranks import ALONE, Ranks
from compressllm.core.run import Run, Track, untracked
from compressllm.eval.config import EvalConfig
from compressllm.eval.harness import check_tasks
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.facts import read_facts
from compressllm.recover.config import RecoverConfig
from compressllm.recover.data import record_files
from compressllm.stages.environment import PeakMemory, resident_bytes
from compressllm.stages.export import complete_card
from compressllm.stages.folder import RunFolder
from compressllm.stages.memory import check_memory, estimate
from compressllm.stages.recipe import Recipe
from compressllm.stages.space import check_space, needed_space, space_text, total_space
from compressllm.stages.stage import STAGES, Stage


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = True,
    show: Track = untracked,
    on_warning: Callable[[str], None] = lambda message: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run a recipe's stages in order and return the manifest.

    Each finished stage is in ``out`` before the next begins; a stage that walks the model also keeps its finished
    blocks there. A killed run goes on from there when it is called again, to the same result, bit for bit.

    Args:
        out: New or empty folder, or one that an interrupted run of the same recipe left.
        resume: Whether such a folder is taken up.
        ranks: Processes that make the same call. The first runs the stages, and the others do their share of those
            that can be shared. ``show`` and ``on_warning`` are heard on the first only.

    Raises: RankError if another rank failed; RunError if ``out`` is in use, or what is to be written does not fit on
        its disk; CompressError of the kind that fits; OSError if the disk is full all the same.
    """
    if ranks.rank:
        return _assist(recipe, ranks)
    check_sources(recipe)
    bundle = open_bundle(recipe.model)
    with RunFolder(out, recipe, resume, bundle.checkpoint.folder.name if bundle.checkpoint else "") as folder:
        finished = len(folder.manifest["stages"])
        if todo := needed_space(recipe, bundle)[finished:]:
            check_space(todo, out, folder.stage_path(finished, todo[0].stage))
        for index, (name, config) in enumerate(recipe.steps()):
            if done := folder.stage_done(index):
                if done["model"]:
                    bundle = open_bundle(str(folder.model_of(done)))
                continue
            stage_folder = folder.stage_folder(index, name)
            shared = bundle.checkpoint if STAGES[name].shared else None
            if shared:
                ranks.exchange(_Order(index, shared.folder.absolute(), stage_folder.absolute()))
            run = Run(recipe.seed, stage_folder, show, on_warning, ranks=ranks, defer=folder.defer)
            bundle, entry = _run_stage(name, config, bundle, run, folder)
            if shared:
                ranks.exchange(None)  # the others have read what is moved to its place next
            folder.finish_stage(entry)
        if not folder.manifest["finished"]:
            folder.finish(complete_card)
        ranks.exchange(folder.manifest)
        return folder.manifest


@dataclass(frozen=True)
class _Order:
    """What the first rank asks of the others: to run a shared stage with it."""

    index: int
    model: Path
    folder: Path


def _assist(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """Do this rank's share of the stages that the first rank calls for, until it shows the manifest."""
    while True:
        order: _Order | dict[str, Any] | None = ranks.exchange(None)[0]
        if not isinstance(order, _Order):
            return order or {}
        name, config = recipe.steps()[order.index]
        STAGES[name].run(open_bundle(str(order.model)), config, Run(recipe.seed, order.folder, ranks=ranks))
        ranks.exchange(None)


def check_sources(recipe: Recipe) -> None:
    """Find out now that a later stage's text, records or tasks are not there, rather than hours into the run.

    Raises: RecipeError, CalibrationError, BackendUnavailableError.
    """
    for _, config in recipe.steps():
        for holder in (config, getattr(config, "calibration", None)):
            if spec := getattr(holder, "source", None):
                open_source(spec)
        if isinstance(config, EvalConfig):
            check_tasks(config)
        for spec in getattr(config, "data", ()):
            open_source(spec)
        if isinstance(config, RecoverConfig):
            record_files(config)


def check_recipe(recipe: Recipe) -> list[str]:
    """What a run of the recipe would do, one line a stage, having checked all that can be without doing it.

    Raises: CompressError of the kind that fits.
    """
    check_sources(recipe)
    bundle = open_bundle(recipe.model)
    lines = [f"model: {recipe.model}, {_parameters(bundle):,} parameters in {bundle.stored_dtype}"]
    for name, config in recipe.steps():
        lines.append(f"{name}: " + STAGES[name].plan(bundle, config))
    if space := total_space(needed_space(recipe, bundle)):
        lines.append(f"disk space: about {space_text(space)}")
    return lines


def _weight_bytes(bundle: Bundle) -> int:
    """Bytes of the weights on disk, masks left out."""
    specs = bundle.checkpoint.stored_specs if bundle.checkpoint else {}
    return sum(spec.bytes for spec in specs.values())


def _parameters(bundle: Bundle) -> int:
    """Weights on disk, packed ones counted as what they stand for."""
    specs = bundle.checkpoint.specs if bundle.checkpoint else {}
    return sum(math.prod(spec.shape) for spec in specs.values())


def _run_stage(name: str, config: Config, bundle: Bundle, run: Run, folder: RunFolder) -> tuple[Bundle, dict[str, Any]]:
    stage = STAGES[name]
    begun, memory, before = time.perf_counter(), PeakMemory(), _weight_bytes(bundle)
    if stage.writes_model and name not in {"quantize", "contextual"} and bundle.quantized():
        run.warn(f"{name}: the model is quantised, and what is written is not: its weights become plain numbers")
    held, need = resident_bytes(), estimate(name, bundle, config) if bundle.checkpoint else None
    if need:
        check_memory(name, need, config, run)
    bundle = _run(stage, bundle, config, run)
    model = run.folder / "model" if run.folder and stage.writes_model else None
    facts = read_facts(model) if model else None
    sizes = {"bytes_before": before, "bytes_after": _weight_bytes(bundle)} if model else {}
    return bundle, {
        "stage": name,
        "config": config.model_dump(mode="json"),
        "seconds": round(time.perf_counter() - begun, 3),
        "peak_memory_bytes": memory.bytes(),
        "estimated_memory_bytes": held + need.bytes if need else None,
        "metrics": run.metrics | sizes,
        "linears": run.records,
        "block_seconds": run.block_seconds,
        "warnings": run.warnings,
        "model": str(model.relative_to(folder.path)) if model else None,
        "sha256": facts.sha256 if facts else {},
    }


def _run(stage: Stage, bundle: Bundle, config: Config, run: Run) -> Bundle:
    """Run a stage. Raises OutOfMemoryError where memory does not do, however small its batches."""
    try:
        return stage.run(bundle, config, run)
    except (torch.OutOfMemoryError, MemoryError) as error:
        kind, reason = "the device" if isinstance(error, torch.OutOfMemoryError) else "the machine", str(error)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what torch's allocator for the CPU raises
            raise
        kind, reason = "the machine", str(error)
    raise OutOfMemoryError(
        f"{stage.name}: {kind} ran out of memory ({' '.join(reason.split())[:120]}); give shorter windows, fewer "
        "threads (OMP_NUM_THREADS) or another device; finished work is kept, the same command resumes it"
    )
