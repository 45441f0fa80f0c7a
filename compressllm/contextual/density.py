"""How much of a model drafting reads, and what correction makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from compressllm.contextual.attach import Contextual
from compressllm.contextual.decode import Counts
from compressllm.contextual.inputs import linears_in

_LONGEST_PERIOD = 32


def read_density(contextual: Contextual, planned: bool = False) -> float:
    """Weights that a drafted token reads, over those that a token of the dense model reads.

    Counted are all linears of the blocks and the output head; of the input embedding a token reads one row.

    Args:
        planned: By the density asked for; else as counted while drafting, where anything was.
    """
    blocks, head = _sizes(contextual)
    return 1 - _spared(contextual, planned) / (blocks + head)


def param_density(contextual: Contextual) -> float:
    """The planned share of all parameters, input embedding included, as papers count it."""
    total: int = sum(p.numel() for p in contextual.model.parameters())
    return 1 - _spared(contextual, planned=True) / total


def effective_density(period: float, read: float, advance: float, check_cost: float = 1.0) -> float:
    """Cost of a token by drafting and correcting, over a token's of the dense model: ``((k - 1) d + c) / advance``.

    Args:
        period: k, tokens of a dense pass.
        read: d, cost of a sparse step over a dense one.
        advance: Mean tokens of a cycle.
        check_cost: c, cost of a dense pass of k tokens over one of a single token.

    Source: Sirius, arXiv 2409.03856, section 6.2; its published rows follow from this with c = 1.
    """
    return ((period - 1) * read + check_cost) / advance


def measured_density(counts: Counts, read: float, check_cost: float = 1.0) -> float | None:
    """The same from what a generation did; None if it did nothing after the prompt."""
    made = sum(counts.advances) or counts.drafts
    return (counts.drafts * read + counts.checks * check_cost) / made if made else None


def expected_advance(rate: float, period: int) -> float:
    """Mean tokens of a cycle if each drafted token stands with this probability: ``(1 - q^k) / (1 - q)``."""
    return float(period) if rate >= 1 else (1 - rate**period) / (1 - rate)


def suggest_period(rate: float, read: float, check_cost: Callable[[int], float] = lambda period: 1.0) -> int:
    """The period of least cost a token, up to 32; 1 if drafting does not pay.

    Args:
        rate: Probability that a drafted token stands.
        read: Cost of a sparse step over a dense one.
        check_cost: Cost of a dense pass of so many tokens over one of a single token.
    """

    def cost(period: int) -> float:
        return effective_density(period, read, expected_advance(rate, period), check_cost(period))

    return min(range(1, _LONGEST_PERIOD + 1), key=cost)


def break_even(period: int, read: float, check_cost: float = 1.0) -> float:
    """The mean advance above which correcting is faster than the dense model."""
    return (period - 1) * read + check_cost


def _sizes(contextual: Contextual) -> tuple[int, int]:
    """Weights of the blocks' linears, and of the output head."""
    blocks = contextual.blocks
    linears = [one for at, m in enumerate(blocks.modules) for one in linears_in(m, blocks.name(at)).values()]
    head = contextual.model.get_output_embeddings()
    return sum(map(_size, linears)), _size(head) if head is not None else 0


def _size(linear: nn.Module) -> int:
    return int(linear.out_features) * int(linear.in_features)  # type: ignore[arg-type]


def _spared(contextual: Contextual, planned: bool) -> float:
    return math.fsum(one.size * (1 - (one.planned() if planned else one.read())) for one in contextual.runners)
