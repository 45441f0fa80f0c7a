"""Prune a model, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compressllm.calibration.walker import Block, WalkOptions, walk_blocks
from compressllm.calibration.windows import Windows, load_windows
from compressllm.core.compute import choose_device, choose_dtype
from compressllm.core.errors import FormatError
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import PRUNERS, Pruned
from compressllm.core.registry import build
from compressllm.core.run import Run
from compressllm.core.stats import InputStats, Need
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.record import FolderRecord, FollowingRecord, LiveRecord, Record, Rows
from compressllm.models.weights import Weights
from compressllm.prune.config import PruneConfig
from compressllm.prune.given import GivenMasks, open_given
from compressllm.prune.plan import make_plan
from compressllm.prune.sharing import assign_linears, gather_linears_


def prune_model(bundle: Bundle, config: PruneConfig | None = None, run: Run | None = None) -> Bundle:
    """Prune front to back, each block calibrated on what the pruned blocks before it put out.

    A bundle that holds its weights itself is changed in place. One with a checkpoint is never in memory as a
    whole: the pruned checkpoint is written block by block into ``run.folder``, from where a killed call resumes.
    Where ``run.ranks`` are several, all of them make the same call: each puts its share of the windows through the
    blocks and prunes its share of their linears, and all end with the same bundle. The first writes the folder, which
    all of them must see.

    Raises: PatternError, RecipeError, CalibrationError, UnsupportedModelError; FormatError for weights that are
        not finite; RunError if ``run.folder`` holds a call with other settings; RankError if another rank failed.
    """
    config, run = config or PruneConfig(), run or Run()
    pruner = build(PRUNERS, config.method, {"seed": run.seed})
    given = open_given(config, pruner, bundle)
    plan = given.plan if given else make_plan(bundle.model, config.pattern, config.skip, pruner.group)
    windows = _windows(bundle, config, run) if pruner.needs else None
    device, dtype = _compute(bundle, config, run)
    record = _open_record(bundle, config, run, plan, windows, given, dtype, device)
    options = WalkOptions(
        device=device,
        memory_limit=int(config.activation_memory_gb * 1e9),
        spill_folder=run.folder,
        ranks=run.ranks,
    )

    def solve(name: str, weight: Tensor, stats: InputStats) -> Pruned:
        return given.refine(name, weight, stats) if given else pruner.prune(weight, stats, plan[name])

    ids = run.ranks.share(windows.ids) if windows else None
    blocks = walk_blocks(bundle.model, ids, record.weights, options, start=record.done)
    for block in run.track(blocks, len(find_blocks(bundle.model).modules) - record.done, "pruning"):
        masks, rows = _prune_block(block, plan, pruner.needs, solve, config.order, record.weights, run)
        record.finish(block.name, masks, rows)

    pruned_bundle = run.ranks.first_then_rest(record.close)
    for row in record.rows:
        run.log(**row)
    run.metrics.update(
        linears=len(plan),
        sparsity=pruned_bundle.masks.sparsity(),
        given_masks_sha256=given.sha256 if given else None,
        masks_sha256=pruned_bundle.masks.sha256(),
        calibration=windows.facts() if windows else None,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        processes=run.ranks.size,
        resumed_at_block=record.done or None,
    )
    return pruned_bundle


def _prune_block(
    block: Block,
    plan: Mapping[str, SparsityPattern],
    needs: frozenset[Need],
    solve: Callable[[str, Tensor, InputStats], Pruned],
    order: str,
    weights: Weights,
    run: Run,
) -> tuple[dict[str, Tensor], Rows]:
    """Prune the planned linears of a block, in place; their masks, and a row of facts for each."""
    planned = [name for name in block.linears if name in plan]
    for name in planned:
        _check_finite(name, weights.read(f"{name}.weight"))  # or the activations would be blamed
    masks: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for stats in block.collect_in_turn(needs) if order == "sequential" else (block.collect(needs),):
        turn = [name for name in planned if name in stats]
        owner = assign_linears({name: block.linears[name].weight.shape for name in turn}, stats, run.ranks.size)
        own = {name: stats[name] for name in turn if owner[name] == run.ranks.rank}
        stats.clear()  # what others prune is freed now, and each input of ours with the last linear that has it
        own_masks: dict[str, Tensor] = {}
        own_rows: Rows = []
        for name in list(own):
            seen = own.pop(name)
            weight = weights.read(f"{name}.weight").to(block.device, torch.float32)
            with torch.inference_mode():
                pruned = solve(name, weight, seen)
            own_masks[name] = pruned.keep
            own_rows.append(_row(name, weight, pruned, seen, plan[name]))
            weights.replace_(f"{name}.weight", pruned.weight)  # last: `weight` may be the parameter itself
        all_masks, all_rows = gather_linears_(run.ranks, owner, own_masks, own_rows, weights, block.device)
        masks |= all_masks
        rows |= {row["linear"]: row for row in all_rows}
    for row in rows.values():
        if "fallback" in row:
            run.warn(f"{row['linear']}: {row['fallback']}")
    return masks, [rows[name] for name in planned]


def _compute(bundle: Bundle, config: PruneConfig, run: Run) -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype blocks run; a model that holds its weights itself stays as it is."""
    if bundle.checkpoint is None:
        return bundle.model.device, bundle.stored_dtype
    device = run.ranks.own_device(choose_device(config.device))
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
    given: GivenMasks | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Record:
    fingerprint = {
        "settings": config.model_dump(mode="json"),
        "seed": run.seed,
        "calibration text": windows.sha256 if windows else None,
        "masks": given.sha256 if given else None,
        "number of processes": run.ranks.size,  # sums over windows depend on it, in their last bits
    }
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
