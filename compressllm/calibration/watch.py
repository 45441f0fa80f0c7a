"""Hooks that collect statistics of linears' inputs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from compressllm.calibration.experts import Experts, fed, merged
from compressllm.calibration.inputs import Enough
from compressllm.core.pooling import finish_stats, pool_stats
from compressllm.core.ranks import ALONE, Ranks
from compressllm.core.stats import InputStats, Need, StatsAccumulator


@dataclass
class Seen:
    """What one forward pass adds to the statistics.

    Args:
        totals: Linear name -> its own accumulator, of everything but the Hessian.
        inputs: Linear name -> (tokens, in) inputs that are to be counted into its Hessian. Whoever merges passes
            multiplies them out, so that there is one Hessian of each input and not one a pass.
    """

    totals: dict[str, StatsAccumulator] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)


class InputWatch:
    """Collects the input statistics of some linears while it is entered.

    Linears that are called with the same tensor (q, k and v; gate and up) share one accumulator. The first pass finds
    out which; if it also calls every linear once, later passes end at the last of them. After the first, passes may
    run in several threads at once; merged in order, they give the same statistics however many there are.

    Args:
        linears: Name -> module whose first argument is the linear's input.
        needs: Statistics to collect.
        experts: Mixtures whose experts' linears are watched as well.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], needs: frozenset[Need], experts: Sequence[Experts] = ()
    ) -> None:
        self._linears, self._needs, self._experts = linears, needs, experts
        self._pools = [pool for one in experts for pool in one.pools()]
        self._names = [*linears, *(linear.name for pool in self._pools for linear in pool)]
        self._leader: dict[str, str] | None = None  # linear -> the first that was called with the same tensor
        self._last: str | None = None
        self._stats: dict[str, StatsAccumulator] = {}
        self._pass = threading.local()
        self._handles: list[Any] = []

    def __enter__(self) -> InputWatch:
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._hook(name)))
        for experts in self._experts:
            self._handles.append(experts.module.register_forward_pre_hook(self._experts_hook(experts)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def measure(self, forward: Callable[[], object]) -> Seen:
        """What one forward pass has seen, run in this thread."""
        seen = Seen()
        # Tensors are held until the pass is over, so that none can be mistaken for another in its old place.
        calls: list[tuple[str, Tensor]] = []
        self._pass.seen, self._pass.calls = seen, calls
        try:
            forward()
        except torch.OutOfMemoryError:
            self._pass.seen, self._pass.calls = Seen(), []  # for there is to be room for another try
            raise
        if self._leader is None:
            self._leader = {}
            for name, tensor in calls:
                self._leader.setdefault(name, next(first for first, other in calls if other is tensor))
            if Counter(name for name, _ in calls) == Counter(self._names):
                self._last = calls[-1][0]
            for name, leader in self._leader.items():
                if name != leader:
                    seen.totals.pop(name, None)
                    seen.inputs.pop(name, None)
        self._pass.seen, self._pass.calls = Seen(), []
        return seen

    def merge_(self, seen: Seen) -> None:
        """Count one pass."""
        for name, totals in seen.totals.items():
            stats = self._stats.setdefault(name, StatsAccumulator(self._needs))
            stats.merge_(totals)
            for x in seen.inputs.get(name, ()):
                stats.add_gram_(x)

    def groups(self) -> list[list[str]] | None:
        """Linears that are called with the same tensor, in the order of the first calls; None if the first pass did
        not call every linear exactly once, or has not been run.
        """
        if self._leader is None or self._last is None:
            return None
        grouped: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            grouped.setdefault(leader, []).append(name)
        return list(grouped.values())

    def finish(self, ranks: Ranks = ALONE) -> dict[str, InputStats]:
        """The statistics of every linear, over what all ranks saw. The watch cannot be gone on with.

        Raises: CalibrationError naming the linear that saw no token or a value that is not finite.
        """
        unseen = StatsAccumulator(self._needs)
        own = {name: self._stats.get((self._leader or {}).get(name, name), unseen) for name in self._names}
        device = next(next(iter(self._linears.values())).parameters()).device
        pooled = pool_stats(ranks, own, device)
        filled, notes = dict(pooled), {}
        for pool in self._pools:
            everyone = cache(partial(merged, self._needs, pooled, pool))
            done: dict[int, tuple[StatsAccumulator, str | None]] = {}  # gate and up have one between them
            for linear in pool:
                one = pooled[linear.name]
                if id(one) not in done:
                    done[id(one)] = fed(linear, one, everyone)
                filled[linear.name], notes[linear.name] = done[id(one)]
        return finish_stats(filled, notes)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._see(name, args[0])

        return hook

    def _experts_hook(self, experts: Experts) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for name, inputs in experts.inputs(args[0], args[1]):
                self._see(name, inputs)

        return hook

    def _see(self, name: str, inputs: Tensor) -> None:
        seen: Seen = self._pass.seen
        if self._leader is None:
            self._pass.calls.append((name, inputs))
        if (self._leader is None or self._leader.get(name, name) == name) and inputs.numel():
            seen.totals.setdefault(name, StatsAccumulator(self._needs - {"hessian"})).add_(inputs)
            if "hessian" in self._needs:
                seen.inputs.setdefault(name, []).append(inputs.reshape(-1, inputs.shape[-1]))
        if name == self._last:
            raise Enough
