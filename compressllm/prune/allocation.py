"""From the patterns that were asked for to the plan that is pruned by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from compressllm.core.atomic import write_json
from compressllm.core.errors import RecipeError
from compressllm.core.pattern import SparsityPattern, Unstructured
from compressllm.core.protocols import Allocation, Allocator, DenseLinear
from compressllm.core.run import Run, read_journal
from compressllm.prune.apportion import Shape, apportion, asked_sparsity, planned_sparsity
from compressllm.prune.config import PruneConfig
from compressllm.prune.plan import first_match
from compressllm.prune.uniform import Uniform

#: Where an allocation that looked at the model is kept in the stage's folder, so that resuming does not look again.
ALLOCATION = "allocation.json"

# How far the total may be from what was asked before that is warned of.
_TOLERANCE: Final = 1e-4


@dataclass(frozen=True)
class Plan:
    """Which pattern each linear gets, and how it came to that.

    Args:
        patterns: Linear name -> pattern, with whole numbers of removed weights.
        asked: Fraction of the planned weights that was asked for.
        notes: What the allocation rests on.
    """

    patterns: dict[str, SparsityPattern]
    asked: float
    notes: Mapping[str, Any] = field(default_factory=dict)


def allocate(
    asked: Mapping[str, SparsityPattern],
    shapes: Mapping[str, Shape],
    config: PruneConfig,
    allocator: Allocator,
    dense: Callable[[Collection[str]], Iterator[tuple[str, Mapping[str, DenseLinear]]]],
    run: Run,
    fingerprint: Mapping[str, Any],
) -> Plan:
    """Spread the sparsity of ``config.pattern`` over the linears that have no pattern of their own.

    Args:
        asked: Linear name -> pattern, as `make_plan` gives it.
        shapes: Linear name -> (out, in).
        dense: Walks the dense model once, showing the linears it is given the names of.
        fingerprint: Everything the allocation depends on. One that is kept in ``run.folder`` with the same is taken.

    Raises: RecipeError for an N:M pattern and an allocator that is not uniform.
    """
    patterns, notes = dict(asked), {}
    if not isinstance(allocator, Uniform):
        pattern = config.pattern
        if not isinstance(pattern, Unstructured):
            raise RecipeError(
                f"allocation: {config.allocation!r} spreads a fraction, and {pattern} removes the same everywhere; "
                "give a fraction such as 0.5, or N:M by linear under patterns"
            )
        sizes = {name: math.prod(shapes[name]) for name in asked if first_match(name, config.patterns) is None}
        if sizes:
            made = _kept(run.folder, fingerprint) or allocator.allocate(partial(dense, sizes), sizes, pattern.sparsity)
            if run.ranks.rank == 0:
                _keep(run.folder, fingerprint, made)
            notes = dict(made.notes)
            group = {name: one.group for name, one in asked.items() if isinstance(one, Unstructured)}
            patterns |= {name: Unstructured(made.sparsity[name], group[name]) for name in sizes}
    total = asked_sparsity(asked, shapes)
    plan = Plan(apportion(patterns, shapes), total, notes)
    if abs((planned := planned_sparsity(plan.patterns, shapes)) - total) > _TOLERANCE:
        run.warn(f"sparsity {total:g} was asked for; {planned:.6f} is the nearest that whole weights of each row allow")
    return plan


def _kept(folder: Path | None, fingerprint: Mapping[str, Any]) -> Allocation | None:
    if folder is None or not (folder / ALLOCATION).exists():
        return None
    kept = read_journal(folder / ALLOCATION, {"fingerprint", "sparsity", "notes"})
    same = kept["fingerprint"] == json.loads(json.dumps(fingerprint))
    return Allocation(kept["sparsity"], kept["notes"]) if same else None


def _keep(folder: Path | None, fingerprint: Mapping[str, Any], made: Allocation) -> None:
    if folder is not None:
        kept = {"fingerprint": dict(fingerprint), "sparsity": dict(made.sparsity), "notes": dict(made.notes)}
        write_json(folder / ALLOCATION, kept)
