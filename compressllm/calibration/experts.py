"""What the experts of a mixture are given: each sees only the tokens that are routed to it, and may see few."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from transformers import PreTrainedModel

from compressllm.core.stats import Need, StatsAccumulator
from compressllm.models.linears import PrunableLinear, held_otherwise


@dataclass(frozen=True)
class Experts:
    """The linears of one mixture's experts, which one module holds.

    Args:
        module: It is called with hidden states (tokens, hidden) and the chosen experts of each token, (tokens, k).
        members: Of every expert, front to back: the linears that are given its tokens, and those behind them.
    """

    module: nn.Module
    members: tuple[tuple[tuple[PrunableLinear, ...], tuple[PrunableLinear, ...]], ...]

    def inputs(self, hidden: Tensor, chosen: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name of every linear, and its input (tokens of its expert, in); no row where no token chose the expert.

        gate and up are given the very same tensor.
        """
        for expert, (first, second) in enumerate(self.members):
            tokens = hidden[torch.where(chosen == expert)[0]]
            for linear in first:
                yield linear.name, tokens
            # What the module's own forward does between the two, expert by expert.
            inner = self.module._apply_gate(apply_linear(tokens, self.module.gate_up_proj[expert]))  # type: ignore[operator, index]
            for linear in second:
                yield linear.name, inner

    def pools(self) -> list[list[PrunableLinear]]:
        """Linears of the same kind of input: all that are given tokens, and all behind them."""
        return [[linear for member in self.members for linear in member[side]] for side in (0, 1)]


def experts_among(linears: Iterable[PrunableLinear]) -> list[Experts]:
    """The experts among some linears, those of one module together."""
    found: dict[nn.Module, dict[int, tuple[list[PrunableLinear], list[PrunableLinear]]]] = {}
    for linear in linears:
        if linear.expert is not None:
            member = found.setdefault(linear.module, {}).setdefault(linear.expert, ([], []))
            member[linear.leaf == "down_proj"].append(linear)
    return [
        Experts(module, tuple((tuple(first), tuple(second)) for _, (first, second) in sorted(members.items())))
        for module, members in found.items()
    ]


@contextlib.contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Have a model's experts computed one after the other, in plain operations, and then again as before.

    The grouped kernels that transformers prefers choose their path by device, dtype and even a tensor's address.
    """
    if not any(linear.expert is not None for linear in held_otherwise(model).values()):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def tokens_needed(columns: int) -> int:
    """Tokens from which an expert's own statistics are trusted."""
    return max(256, columns // 8)


def fed(
    linear: PrunableLinear, own: StatsAccumulator, everyone: Callable[[], StatsAccumulator]
) -> tuple[StatsAccumulator, str | None]:
    """The statistics of one expert's input, topped up if too few tokens reached it, and a note that says so.

    What is missing to `tokens_needed` is filled with the mean over all experts of the block: own statistics count as
    the tokens they are from, so that they fade in as tokens come. ``tokens`` counts both.

    Args:
        own: What reached the expert.
        everyone: What reached all experts. Each token chooses as many experts, so that of gate and up this is,
            but for a constant factor, what the block's tokens are.

    Raises: CalibrationError for values that are not finite.
    """
    needed = tokens_needed(linear.shape[1])
    if own.tokens >= needed:
        return own, None
    pool, filled = everyone(), StatsAccumulator(own.needs)
    lent = min(needed - own.tokens, pool.tokens)
    filled.merge_(own)
    filled.merge_(_share(pool, lent))
    reached = f"only {own.tokens} tokens reached this expert" if own.tokens else "no token reached this expert"
    note = f"{reached}, {needed} are needed: {lent} tokens' worth of the mean over the block's experts was added"
    return filled, note


def merged(
    needs: frozenset[Need], seen: Mapping[str, StatsAccumulator], pool: list[PrunableLinear]
) -> StatsAccumulator:
    """All that the linears of a pool saw; what several share is counted once.

    Raises: CalibrationError naming the linear that saw a value that is not finite.
    """
    together = StatsAccumulator(needs)
    for name in {id(seen[linear.name]): linear.name for linear in pool}.values():
        seen[name].check_finite(name)
        together.merge_(seen[name])
    return together


def _share(pool: StatsAccumulator, tokens: int) -> StatsAccumulator:
    """The same means, as if over ``tokens`` tokens."""
    factor = tokens / max(1, pool.tokens)
    return StatsAccumulator(pool.needs, tokens, {name: total * factor for name, total in pool.totals.items()})
