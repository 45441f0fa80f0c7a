"""Prune a model, block by block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressllm.calibration.walker import Block, WalkOptions, walk_blocks
from compressllm.calibration.windows import windows_for
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import FormatError, RecipeError, UnsupportedModelError
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import ALLOCATORS, PRUNERS, Pruned
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.core.stats import InputStats
from compressllm.models.blocks import all_linears, find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.journal import Rows
from compressllm.models.linears import PrunableLinear
from compressllm.models.record import FolderRecord, FollowingRecord, LiveRecord, Record, computed_on
from compressllm.models.weights import Weights
from compressllm.prune.allocation import Plan, allocate
from compressllm.prune.apportion import planned_sparsity
from compressllm.prune.block import prune_block
from compressllm.prune.config import PruneConfig, ReconstructConfig
from compressllm.prune.dense import dense_pass
from compressllm.prune.gather import Gather
from compressllm.prune.given import open_given
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
    pruner, allocator = build(PRUNERS, config.method, {"seed": run.seed}), build(ALLOCATORS, config.allocation)
    given = open_given(config, pruner, bundle)
    asked = given.plan if given else make_plan(bundle.model, config.pattern, config.skip, pruner.group, config.patterns)
    linears = all_linears(bundle.model)
    shapes = {name: linears[name].shape for name in asked}
    gather = Gather(config.gather, run.seed) if config.gather else None
    needs = pruner.needs | (gather.needs if gather else frozenset())
    if gather:
        gather.check(asked)
    if config.reconstruct:
        _check_reconstruct({name: linears[name] for name in asked}, run)
    needs_text = bool(needs | allocator.needs or config.reconstruct)
    windows = windows_for(bundle, config.calibration, run) if needs_text else None
    ids = run.ranks.share(windows.ids) if windows else None
    if windows and "hessian" in pruner.needs:
        _warn_of_few_tokens(windows.ids.numel(), max(columns for _, columns in shapes.values()), run)
    device, dtype = _compute(bundle, config, run)
    options = WalkOptions(
        device=device,
        memory_limit=int(config.activation_memory_gb * 1e9),
        spill_folder=run.folder,
        ranks=run.ranks,
        warn=run.warn,
    )
    fingerprint = {
        "settings": config.model_dump(mode="json"),
        "seed": run.seed,
        "calibration text": windows.sha256 if windows else None,
        "masks": given.sha256 if given else None,
        "number of processes": run.ranks.size,  # sums over windows depend on it, in their last bits
    }
    if given:
        plan = Plan(given.plan, planned_sparsity(given.plan, shapes))
    else:
        dense = partial(dense_pass, bundle, allocator.needs, ids, dtype, options, run)
        looked_at = fingerprint | computed_on(bundle.checkpoint, dtype, device)
        plan = allocate(asked, shapes, config, allocator, dense, run, looked_at)
    record = _open_record(bundle, run, plan.patterns, fingerprint, dtype, device)

    def solve(name: str, weight: Tensor, stats: InputStats) -> Pruned:
        if given:
            return given.refine(name, weight, stats)
        pattern = plan.patterns[name]
        return (
            gather.prune(name, weight, stats, pattern, pruner.prune) if gather else pruner.prune(weight, stats, pattern)
        )

    if config.reconstruct:
        options = replace(options, target=config.reconstruct.target, tapped=tapped(config.reconstruct))
    walked = ids if needs or config.reconstruct else None
    blocks = walk_blocks(bundle.model, walked, record.weights, options, start=record.done)
    begun = time.perf_counter()
    for block in run.track(blocks, len(find_blocks(bundle.model).modules) - record.done, "pruning"):
        masks, rows = prune_block(block, plan.patterns, needs, solve, config.order, record.weights, run)
        if config.reconstruct:
            _reconstruct_block(block, masks, rows, record.weights, config.reconstruct, run)
        record.finish(block.name, masks, rows)
        run.block_seconds[block.name] = round(time.perf_counter() - begun, 3)
        begun = time.perf_counter()  # of the next, whose inputs are computed when it is asked for

    pruned_bundle = run.ranks.first_then_rest(record.close)
    for row in record.rows:
        run.log(**{key: value for key, value in row.items() if key != "order"})  # which the model's facts have
    run.metrics.update(
        linears=len(plan.patterns),
        sparsity=pruned_bundle.masks.sparsity(),
        asked_sparsity=plan.asked,
        allocation=dict(plan.notes) or None,
        given_masks_sha256=given.sha256 if given else None,
        masks_sha256=pruned_bundle.masks.sha256(),
        calibration=windows.facts() if windows else None,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        processes=run.ranks.size,
        resumed_at_block=record.done or None,
    )
    if config.reconstruct:
        run.metrics["reconstruct"] = mean_errors(record.rows)
    return pruned_bundle


def _warn_of_few_tokens(tokens: int, widest: int, run: Run) -> None:
    if tokens < 2 * widest:  # with fewer than the inputs, the Hessian is singular but for its damping
        run.warn(
            f"{tokens} tokens of calibration text are few for linears of {widest} inputs, whose second moments a "
            f"solver inverts; give it at least {2 * widest}"
        )


def _check_reconstruct(linears: Mapping[str, PrunableLinear], run: Run) -> None:
    if run.ranks.size > 1:
        raise RecipeError(f"reconstruct: works in one process, {run.ranks.size} were launched; start it without them")
    if odd := next((name for name, linear in linears.items() if linear.form), None):
        raise UnsupportedModelError(f"{odd}: {linears[odd].form}, and cannot be reconstructed; leave reconstruct out")


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


def _compute(bundle: Bundle, config: PruneConfig, run: Run) -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype blocks run; a model that holds its weights itself stays as it is."""
    if bundle.checkpoint is None:
        return bundle.model.device, bundle.stored_dtype
    device = run.ranks.own_device(choose_device(config.device))
    return device, choose_dtype(config.dtype, bundle.stored_dtype, device)


def _open_record(
    bundle: Bundle,
    run: Run,
    plan: dict[str, SparsityPattern],
    fingerprint: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Record:
    patterns = {name: str(pattern) for name, pattern in plan.items()}
    run.ranks.agree({**fingerprint, "patterns": patterns, "dtype": str(dtype), "kind of device": device.type})
    if bundle.checkpoint is None:
        return LiveRecord(bundle, plan)
    if run.folder is None:
        raise FormatError("pruning a checkpoint writes a checkpoint: give the run a folder")
    if run.ranks.rank:
        done, rows = run.ranks.exchange((0, Rows()))[0]  # the first has laid out the folder, or taken it up, by then
        return FollowingRecord(bundle, run.folder, done, rows, dtype, device)
    record = FolderRecord(bundle, plan, run.folder, fingerprint, dtype, device)
    run.ranks.exchange((record.done, record.rows))
    return record
