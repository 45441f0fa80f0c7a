"""Statistics of all ranks, pooled: what one process that saw all the text would have found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compressllm.core.ranks import Ranks
from compressllm.core.stats import InputStats, StatsAccumulator


def pool_stats(
    ranks: Ranks, accumulators: Mapping[str, StatsAccumulator], device: torch.device
) -> dict[str, StatsAccumulator]:
    """The statistics of every linear over all ranks, the same bits on each of them.

    Linears that share an accumulator on every rank share one of the result, and are summed once. Takes over the
    accumulators' tensors and changes them.

    Args:
        accumulators: Linear name -> what it saw on this rank; the same names on all.
        device: Where the totals of a rank that saw no token of a linear, an expert say, are made.

    Raises: RankError, RunError.
    """
    if ranks.size == 1:
        return dict(accumulators)
    first: dict[int, str] = {}
    # Which linears are called with the same tensor may be told apart by one rank and not by another, whose first
    # batch called an expert that the other's did not; so only what all of them hold to be one is taken as one.
    mine = {
        name: (
            first.setdefault(id(own), name),
            own.tokens,
            {stat: tuple(total.shape) for stat, total in own.totals.items()},
        )
        for name, own in accumulators.items()
    }
    seen = ranks.exchange(mine)
    pooled: dict[str, StatsAccumulator] = {}
    shared: dict[tuple[str, ...], StatsAccumulator] = {}
    local: list[tuple[int, StatsAccumulator]] = []  # tokens of this rank, and what will hold those of all
    taken: set[int] = set()
    for name, own in accumulators.items():
        key = tuple(one[name][0] for one in seen)
        if key not in shared:
            shapes = next((one[name][2] for one in seen if one[name][1]), {})
            totals = {
                stat: own.totals[stat] if own.tokens else torch.zeros(shapes[stat], device=device) for stat in shapes
            }
            if id(own) in taken:
                totals = {stat: total.clone() for stat, total in totals.items()}
            taken.add(id(own))
            totals = {stat: total.contiguous() for stat, total in sorted(totals.items())}
            shared[key] = StatsAccumulator(own.needs, sum(one[name][1] for one in seen), totals)
            local.append((own.tokens, shared[key]))
        pooled[name] = shared[key]
    _sum_over_ranks_(ranks, local)
    return pooled


def _sum_over_ranks_(ranks: Ranks, local: list[tuple[int, StatsAccumulator]]) -> None:
    """Sum the totals; squared deviations after they have been moved from each rank's mean to that of all.

    Source: Chan, Golub and LeVeque 1979, for any number of parts: M2 = sum_r M2_r + n_r (m_r - m)^2.
    """
    spread = [(tokens, one, one.totals["mean"].clone()) for tokens, one in local if "var" in one.totals]
    ranks.sum_([one.totals["mean"] for _, one in local if "mean" in one.totals])
    for tokens, one, own_sum in spread:
        if tokens:
            with torch.inference_mode():
                apart = own_sum / tokens - one.totals["mean"] / one.tokens
                one.totals["var"].add_(apart.square_(), alpha=tokens)
    rest: list[Tensor] = [total for _, one in local for stat, total in one.totals.items() if stat != "mean"]
    ranks.sum_(rest)


def finish_stats(
    pooled: Mapping[str, StatsAccumulator], notes: Mapping[str, str | None] | None = None
) -> dict[str, InputStats]:
    """The means of every linear; linears that share an accumulator share the result. Ends the accumulators.

    Args:
        notes: Linear name -> what its statistics were filled up with, see `InputStats`.

    Raises: CalibrationError naming the linear that saw no token or a value that is not finite.
    """
    done: dict[int, InputStats] = {}
    means: dict[str, InputStats] = {}
    for name, one in pooled.items():
        if id(one) not in done:
            done[id(one)] = replace(one.finish(name), pooled=(notes or {}).get(name))
        means[name] = done[id(one)]
    return means
