"""Prune the linears of one block from statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compressllm.calibration.walker import Block
from compressllm.core.errors import CalibrationError
from compressllm.core.gathered import Gathered
from compressllm.core.layererror import relative_error
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import Pruned
from compressllm.core.run import Run
from compressllm.core.stats import InputStats, Need
from compressllm.models.journal import Rows
from compressllm.models.weights import Weights
from compressllm.prune.dense import check_finite
from compressllm.prune.sharing import assign_linears, gather_linears_


def prune_block(
    block: Block,
    plan: Mapping[str, SparsityPattern],
    needs: frozenset[Need],
    solve: Callable[[str, Tensor, InputStats], Pruned],
    order: str,
    weights: Weights,
    run: Run,
) -> tuple[dict[str, Tensor], Rows]:
    """Prune the planned linears of a block, in place; their masks, and a row of facts for each.

    Args:
        needs: Input statistics that ``solve`` reads.
        solve: From a linear's name, (out, in) float32 weight and statistics to its pruned weight.
        order: ``parallel`` or ``sequential``, see `PruneConfig`.

    Raises: FormatError for weights that are not finite; CalibrationError; UnsupportedModelError.
    """
    planned = [name for name in block.linears if name in plan]
    for name in planned:
        check_finite(name, weights.read(f"{name}.weight"))  # or the activations would be blamed
    masks: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for stats in block.collect_in_turn(needs) if order == "sequential" else (block.collect(needs),):
        turn = [name for name in planned if name in stats]
        owner = assign_linears({name: block.linears[name].shape for name in turn}, stats, run.ranks.size)
        own = {name: stats[name] for name in turn if owner[name] == run.ranks.rank}
        stats.clear()  # what others prune is freed now, and each input of ours with the last linear that has it
        own_masks: dict[str, Tensor] = {}
        own_rows: Rows = []
        for name in list(own):
            seen = own.pop(name)
            weight = weights.read(f"{name}.weight").to(block.device, torch.float32)
            pruned = _solved(name, weight, seen, solve)
            own_masks[name] = pruned.keep
            own_rows.append(_row(name, weight, pruned, seen, pruned.pattern or plan[name]))
            weights.replace_(f"{name}.weight", pruned.weight)  # last: `weight` may be the parameter itself
            del seen, pruned
        all_masks, all_rows = gather_linears_(run.ranks, owner, own_masks, own_rows, weights, block.device)
        masks |= all_masks
        rows |= {row["linear"]: row for row in all_rows}
    starved = sum("pooled" in row for row in rows.values())
    if starved:
        run.warn(
            f"{block.name}: too few tokens reached the experts of {starved} linears, whose statistics were filled up "
            "with those of all experts; their rows say how far, and more calibration text helps"
        )
    for row in rows.values():
        if row.get("fallback") != row.get("pooled"):
            run.warn(f"{row['linear']}: {row['fallback']}")
    return masks, [rows[name] for name in planned]


def _solved(name: str, weight: Tensor, stats: InputStats, solve: Callable[[str, Tensor, InputStats], Pruned]) -> Pruned:
    try:
        with torch.inference_mode():
            pruned = solve(name, weight, stats)
    except CalibrationError as error:  # methods do not know whose weight they have
        raise CalibrationError(f"{name}: {error}") from None
    if not pruned.weight.isfinite().all():
        raise CalibrationError(
            f"{name}: was solved to weights that are not finite; its inputs or weights are too large or too small for "
            "float32: check the checkpoint, or take a method that only chooses weights, as wanda"
        )
    return pruned


def _row(name: str, weight: Tensor, pruned: Pruned, stats: InputStats, pattern: SparsityPattern) -> dict[str, Any]:
    fallback = "; ".join(reason for reason in (stats.pooled, pruned.fallback) if reason)
    return {
        "linear": name,
        "pattern": str(pattern),
        "sparsity": 1.0 - int(pruned.keep.count_nonzero()) / pruned.keep.numel(),
        "tokens": stats.tokens,
        "error": relative_error(weight, pruned.weight, stats),
        **({"order": pattern.order_text} if isinstance(pattern, Gathered) else {}),
        **pruned.notes,
        **({"pooled": stats.pooled} if stats.pooled else {}),
        **({"fallback": fallback} if fallback else {}),
    }
