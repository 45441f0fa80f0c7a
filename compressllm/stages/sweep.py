"""The curve of perplexity against sparsity, and its knee."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from compressllm.calibration.source import open_source
from compressllm.core.atomic import drop_scratch, write_atomically, write_json
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import CompressError, RecipeError, RunError
from compressllm.core.pattern import SparsityPattern, Unstructured
from compressllm.core.registry import split_spec
from compressllm.core.run import Run, Track, label_text, untracked
from compressllm.eval.knee import farthest_from_chord, last_within
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.models.record import computed_on
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.stages.curve import sweep_svg
from compressllm.stages.environment import environment
from compressllm.stages.evaluate import measure
from compressllm.stages.folder import LOCK, lock_folder, now
from compressllm.stages.sweepconfig import SweepConfig

RESULT, CURVE = "sweep.json", "sweep.svg"

_MEASURED: Final = ("perplexity", "nll", "tokens", "windows")
_PROTOCOL: Final = ("source", "ids_sha256", "text_sha256", "seqlen", "dtype", "protocol")


def sweep_model(
    model: str,
    config: SweepConfig,
    out: Path,
    *,
    seed: int = 0,
    show: Track = untracked,
    on_warning: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure the dense model and the model pruned to each point, and return what ``sweep.json`` holds.

    ``out`` receives ``sweep.json``, rewritten after each point, and ``sweep.svg``. The pruned checkpoint of a point
    is in ``out`` until it is measured, so that one is on the disk at a time. A sweep that was killed goes on after
    its last point when it is called again.

    Args:
        model: Anything `resolve_model` takes.
        out: New or empty folder, or one with the same sweep.

    Raises: RunError if the folder holds anything else, or is in use; CompressError of the kind that fits.

    Source: the protocol of Jaiswal et al., The Emergence of Essential Sparsity, arXiv 2306.03805, for the defaults.
    """
    if config.evaluation.text is None:
        raise RecipeError("evaluation: a sweep draws perplexity, and with tasks alone there is none; name a source too")
    open_source(config.evaluation.text)
    open_source(config.calibration.source)
    bundle = open_bundle(model)
    made = not out.exists()
    with lock_folder(out):
        try:
            drop_scratch(out)
            return _sweep(model, bundle, config, out, Run(seed=seed, show=show, on_warning=on_warning))
        except CompressError:
            if made and not (out / RESULT).exists():
                shutil.rmtree(out)
            raise


def _sweep(model: str, bundle: Bundle, config: SweepConfig, out: Path, run: Run) -> dict[str, Any]:
    result = _begin_or_take_up(model, bundle, config, out, run)
    points: list[SparsityPattern] = [Unstructured(0.0), *config.points]
    for index, pattern in enumerate(points):
        at = replace(run, show=_labelled(run.show, f"{pattern}: " if index else "dense: "))
        folder = out / f"point-{index:02d}"
        if index >= len(result["points"]):
            point, protocol = _point(bundle, pattern, config, folder, at)
            if protocol["ids_sha256"] != result.setdefault("protocol", protocol)["ids_sha256"]:
                raise RunError(f"{out}: was begun with another evaluation text; restore it, or give a new folder")
            result["points"].append(point)
            write_json(out / RESULT, result)
        shutil.rmtree(folder, ignore_errors=True)
    if not result["finished"]:
        result |= {"knee": find_knees(result["points"], config.rise), "finished": now()}
        write_json(out / RESULT, result)
    title = f"{Path(model).name or model}: {split_spec(config.method, 'pruner')[0]} pruning"
    write_atomically(out / CURVE, sweep_svg(result["points"], result["knee"], title))
    return result


def _begin_or_take_up(model: str, bundle: Bundle, config: SweepConfig, out: Path, run: Run) -> dict[str, Any]:
    device = choose_device(config.evaluation.device)
    dtype = choose_dtype(config.evaluation.dtype, bundle.stored_dtype, device)
    sweep = {
        "model": model,
        "seed": run.seed,
        "config": config.model_dump(mode="json"),
        **computed_on(bundle.checkpoint, dtype, device),
    }
    if (out / RESULT).exists():
        try:
            result: dict[str, Any] = json.loads((out / RESULT).read_text())
            before = result["sweep"]
            if not isinstance(result["points"], list) or "finished" not in result:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{out / RESULT}: is damaged; give a new folder") from None
        if changed := [key for key, value in json.loads(json.dumps(sweep)).items() if before.get(key) != value]:
            raise RunError(
                f"{out}: holds a sweep with another {', '.join(changed)}; give a new folder, or the same sweep again"
            )
        return result
    if held := sorted(path.name for path in out.iterdir() if path.name != LOCK):
        raise RunError(f"{out}: holds {held[0]} and no sweep; give a new or empty folder")
    return {"schema": 1, "sweep": sweep, "begun": now(), "finished": None, "environment": environment(), "points": []}


def _point(
    bundle: Bundle, pattern: SparsityPattern, config: SweepConfig, folder: Path, run: Run
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One point of the curve, and the protocol it was measured under."""
    begun = time.perf_counter()
    pruned, facts = bundle, {"pattern": "dense", "sparsity": 0.0, "asked_sparsity": 0.0, "masks_sha256": None}
    if pattern.sparsity > 0:
        folder.mkdir(exist_ok=True)
        inner = Run(seed=run.seed, folder=folder, show=run.show, on_warning=run.on_warning)
        pruned = prune_model(bundle, prune_config(config, pattern), inner)
        facts = {"pattern": str(pattern)}
        facts |= {key: inner.metrics[key] for key in ("sparsity", "asked_sparsity", "masks_sha256")}
    measured = measure(pruned, config.evaluation, run)
    if not math.isfinite(measured["perplexity"]):
        measured["perplexity"] = None  # past the range of a float, and of JSON; the loss says it
    point = {**facts, **{key: measured[key] for key in _MEASURED}, "seconds": round(time.perf_counter() - begun, 3)}
    return point, {key: measured[key] for key in _PROTOCOL}


def prune_config(config: SweepConfig, pattern: SparsityPattern) -> PruneConfig:
    """How one point is pruned. N:M removes the same everywhere, so that there is nothing to allocate."""
    allocation: Any = "uniform"
    if isinstance(pattern, Unstructured):
        whole = config.resolved_group == "model"
        allocation = "global" if whole else config.allocation
        pattern = Unstructured(pattern.fraction, "layer" if whole else config.group)  # type: ignore[arg-type]
    return PruneConfig(
        method=config.method,
        pattern=pattern,
        allocation=allocation,
        skip=config.skip,
        calibration=config.calibration,
        dtype=config.evaluation.dtype,
        device=config.evaluation.device,
    )


def find_knees(points: list[dict[str, Any]], rise: float) -> dict[str, Any]:
    """The knees of a curve, each as its point or None.

    Args:
        points: The dense one first.
        rise: Relative rise that is let pass.
    """
    sparsities = [point["sparsity"] for point in points]
    losses = [point["nll"] for point in points]
    perplexities = [math.inf if point["perplexity"] is None else point["perplexity"] for point in points]
    curve = sorted((point for point in points if ":" not in point["pattern"]), key=lambda point: point["sparsity"])
    bend = farthest_from_chord([point["sparsity"] for point in curve], [point["nll"] for point in curve])
    return {
        "rise": rise,
        "loss": _place(points[last_within(sparsities, losses, losses[0], rise)]),
        "perplexity": _place(points[last_within(sparsities, perplexities, perplexities[0], rise)]),
        "chord": None if bend is None else _place(curve[bend]),
    }


def _labelled(show: Track, before: str) -> Track:
    return lambda items, total, label: show(items, total, before + label_text(label))


def _place(point: dict[str, Any]) -> dict[str, Any]:
    return {key: point[key] for key in ("pattern", "sparsity", "perplexity", "nll")}
