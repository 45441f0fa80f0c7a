"""The linears of a block shared out over ranks: who solves which, and how all get the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressllm.core.ranks import Ranks
from compressllm.core.stats import InputStats
from compressllm.models.journal import Rows
from compressllm.models.weights import Weights


def assign_linears(shapes: Mapping[str, Sequence[int]], stats: Mapping[str, InputStats], ranks: int) -> dict[str, int]:
    """Linear name -> the rank that prunes it; the costliest go first, each to the rank with the least to do.

    Linears with the same statistics go to one rank, where what is derived from them is made once.

    Args:
        shapes: Linear name -> (out, in) of its weight.
        stats: Linear name -> the statistics of its inputs.
    """
    groups: dict[object, list[str]] = {}
    for name in shapes:  # statistics of no token are one object for all linears, and nothing is derived from them
        groups.setdefault(id(stats[name]) if stats[name].tokens else name, []).append(name)
    costs = [(sum(_cost(shapes[name], stats[name]) for name in names), names) for names in groups.values()]
    load = [0] * ranks
    owner: dict[str, int] = {}
    for cost, names in sorted(costs, key=lambda pair: -pair[0]):  # stable: equal ones in the model's order
        rank = load.index(min(load))
        load[rank] += cost
        owner.update(dict.fromkeys(names, rank))
    return {name: owner[name] for name in shapes}


def _cost(shape: Sequence[int], stats: InputStats) -> int:
    """Operations to prune an (out, in) weight, roughly: a solve with a Hessian, or a pass over the weight."""
    out, columns = shape
    return out * columns * (columns if stats.hessian is not None else 1)


def gather_linears_(
    ranks: Ranks,
    owner: Mapping[str, int],
    masks: Mapping[str, Tensor],
    rows: Rows,
    weights: Weights,
    device: torch.device,
) -> tuple[dict[str, Tensor], Rows]:
    """Give every rank the masks, rows and weights of all linears of a block; the weights in place.

    Args:
        owner: Linear name -> the rank that pruned it, in the order of the result.
        masks: Linear name -> (out, in) bool mask, of this rank's linears.
        rows: One row of facts for each of them.
        weights: Holds this rank's pruned weights already.
        device: Where masks are made.

    Raises: RankError, RunError.
    """
    if ranks.size == 1:
        return dict(masks), rows
    row_of = {row["linear"]: row for part in ranks.exchange(rows) for row in part}
    keep: dict[str, Tensor] = {}
    weight: dict[str, Tensor] = {}
    for name, rank in owner.items():
        stored = weights.read(f"{name}.weight")  # as it is stored: rounded already, and no larger than need be
        if rank == ranks.rank:
            keep[name], weight[name] = masks[name].contiguous(), stored.contiguous()
        else:
            keep[name] = torch.empty(stored.shape, dtype=torch.bool, device=device)
            weight[name] = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
    ranks.copy_from_([(rank, tensor[name]) for name, rank in owner.items() for tensor in (keep, weight)])
    for name, rank in owner.items():
        if rank != ranks.rank:
            weights.replace_(f"{name}.weight", weight[name])
    return keep, [row_of[name] for name in owner]
