"""Prune a model, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressllm.calibration.walker import Block, WalkOptions, walk_blocks
from compressllm.calibration.windows import Windows, load_windows
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import FormatError
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import PRUNERS, Pruned, Pruner
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.core.stats import InputStats
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.record import FolderRecord, LiveRecord, Record, Rows
from compressllm.models.weights import Weights
from compressllm.prune.config import PruneConfig, ReconstructConfig
from compressllm.prune.plan import make_plan
from compressllm.prune.reconstruct import mean_errors, reconstruct_, tapped


def prune_model(bundle: Bundle, config: PruneConfig | None = None, run: Run | None = None) -> Bundle:
    """Prune front to back, each block calibrated on what the pruned blocks before it put out.

    A bundle that holds its weights itself is changed in place. One with a checkpoint is never in memory as a
    whole: the pruned checkpoint is written block by block into ``run.folder``, from where a killed call resumes.

    Raises: PatternError, RecipeError, CalibrationError, UnsupportedModelError; FormatError for weights that are
        not finite; RunError if ``run.folder`` holds a call with other settings.
    """
    config, run = config or PruneConfig(), run or Run()
    pruner = build(PRUNERS, config.method, {"seed": run.seed})
    plan = make_plan(bundle.model, config.pattern, config.skip, pruner.group)
    windows = _windows(bundle, config, run) if pruner.needs or config.reconstruct else None
    device, dtype = _compute(bundle, config)
    record = _open_record(bundle, config, run, plan, windows, dtype, device)
    options = WalkOptions(device=device, memory_limit=int(config.activation_memory_gb * 1e9), spill_folder=run.folder)
    if config.reconstruct:
        options = replace(options, target=config.reconstruct.target, tapped=tapped(config.reconstruct))

    ids = windows.ids if windows else None
    blocks = walk_blocks(bundle.model, ids, record.weights, options, start=record.done)
    for block in run.track(blocks, len(find_blocks(bundle.model).modules) - record.done, "pruning"):
        masks, rows = _prune_block(block, pruner, plan, record.weights, run)
        if config.reconstruct:
            _reconstruct_block(block, masks, rows, record.weights, config.reconstruct, run)
        record.finish(block.name, masks, rows)

    pruned_bundle = record.close()
    for row in record.rows:
        run.log(**row)
    run.metrics.update(
        linears=len(plan),
        sparsity=pruned_bundle.masks.sparsity(),
        masks_sha256=pruned_bundle.masks.sha256(),
        calibration=windows.facts() if windows else None,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        resumed_at_block=record.done or None,
    )
    if config.reconstruct:
        run.metrics["reconstruct"] = mean_errors(record.rows)
    return pruned_bundle


def _prune_block(
    block: Block, pruner: Pruner, plan: Mapping[str, SparsityPattern], weights: Weights, run: Run
) -> tuple[dict[str, Tensor], Rows]:
    """Prune the planned linears of a block, in place; their masks, and a row of facts for each."""
    planned = [name for name in block.linears if name in plan]
    for name in planned:
        _check_finite(name, weights.read(f"{name}.weight"))  # or the activations would be blamed
    stats = block.collect(pruner.needs)
    masks, rows = {}, []
    for name in planned:
        seen = stats.pop(name)  # an input's statistics are freed with the last linear that has it
        weight = weights.read(f"{name}.weight").to(block.device, torch.float32)
        with torch.inference_mode():
            pruned = pruner.prune(weight, seen, plan[name])
        if pruned.fallback:
            run.warn(f"{name}: {pruned.fallback}")
        masks[name] = pruned.keep
        rows.append(_row(name, weight, pruned, seen, plan[name]))
        weights.replace_(f"{name}.weight", pruned.weight)  # last: `weight` may be the parameter itself
    return masks, rows


def _reconstruct_block(
    block: Block, masks: Mapping[str, Tensor], rows: Rows, weights: Weights, config: ReconstructConfig, run: Run
) -> None:
    """Train what stays of a pruned block, in place, and add to each linear's row what came of it."""
    row_of = {row["linear"]: row for row in rows}
    for refit in reconstruct_(block, masks, weights, config, run.seed):
        if refit.fallback:
            run.warn(f"{refit.unit}: {refit.fallback}")
        for name in refit.linears:
            row_of[name].update(refit.facts())


def _compute(bundle: Bundle, config: PruneConfig) -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype blocks run; a model that holds its weights itself stays as it is."""
    if bundle.checkpoint is None:
        return bundle.model.device, bundle.stored_dtype
    device = choose_device(config.device)
    return device, choose_dtype(config.dtype, bundle.stored_dtype, device)


def _windows(bundle: Bundle, config: PruneConfig, run: Run) -> Windows:
    calibration = config.calibration
    windows = load_windows(
        calibration.source,
        bundle.tokenizer,
        samples=calibration.samples,
        seqlen=calibration.seqlen,
        seed=run.seed,
        max_seqlen=bundle.max_seqlen,
        vocab_size=bundle.vocab_size,
    )
    if windows.note:
        run.warn(windows.note)
    return windows


def _open_record(
    bundle: Bundle,
    config: PruneConfig,
    run: Run,
    plan: dict[str, SparsityPattern],
    windows: Windows | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Record:
    if bundle.checkpoint is None:
        return LiveRecord(bundle, plan)
    if run.folder is None:
        raise FormatError("pruning a checkpoint writes a checkpoint: give the run a folder")
    fingerprint = {
        "settings": config.model_dump(mode="json"),
        "seed": run.seed,
        "calibration text": windows.sha256 if windows else None,
    }
    return FolderRecord(bundle, plan, run.folder, fingerprint, dtype, device)


def _check_finite(name: str, weight: Tensor) -> None:
    if weight.sum().isfinite():  # one pass; NaN and infinity never leave a sum
        return
    if bad := int(weight.isfinite().logical_not_().count_nonzero()):
        raise FormatError(f"{name}.weight: holds {bad} values that are not finite")


def _row(name: str, weight: Tensor, pruned: Pruned, stats: InputStats, pattern: SparsityPattern) -> dict[str, Any]:
    return {
        "linear": name,
        "pattern": str(pattern),
        "sparsity": 1.0 - int(pruned.keep.count_nonzero()) / pruned.keep.numel(),
        "tokens": stats.tokens,
        "error": relative_error(weight, pruned.weight, stats),
        **pruned.notes,
        **({"fallback": pruned.fallback} if pruned.fallback else {}),
    }


def relative_error(weight: Tensor, pruned: Tensor, stats: InputStats) -> float:
    """Squared output error over squared output, ``tr(D G D^T) / tr(W G W^T)``.

    With mean squares alone, G is taken as diagonal; with no statistics, as the identity. All (out, in) float32.
    """

    def energy(matrix: Tensor) -> float:
        if stats.hessian is not None:
            return float(((matrix @ stats.hessian) * matrix).sum())
        squares = matrix.square()
        return float((squares @ stats.sqnorm).sum() if stats.sqnorm is not None else squares.sum())

    whole = energy(weight)
    return energy(weight - pruned) / whole if whole else 0.0
