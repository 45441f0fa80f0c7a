"""Hooks that collect statistics of linears' inputs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from compressllm.calibration.experts import Experts, fed, merged
from compressllm.calibration.inputs import Enough
from compressllm.core.stats import InputStats, Need, StatsAccumulator

#: What one forward pass adds to the statistics: linear name -> its own accumulator.
Totals = dict[str, StatsAccumulator]


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
        self._stats: Totals = {}
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

    def measure(self, forward: Callable[[], object]) -> Totals:
        """The statistics of one forward pass, run in this thread."""
        totals: Totals = {}
        # Tensors are held until the pass is over, so that none can be mistaken for another in its old place.
        seen: list[tuple[str, Tensor]] = []
        self._pass.totals, self._pass.seen = totals, seen
        forward()
        if self._leader is None:
            self._leader = {}
            for name, tensor in seen:
                self._leader.setdefault(name, next(first for first, other in seen if other is tensor))
            if Counter(name for name, _ in seen) == Counter(self._names):
                self._last = seen[-1][0]
            totals = {name: stats for name, stats in totals.items() if self._leader[name] == name}
        self._pass.totals, self._pass.seen = {}, []
        return totals

    def merge_(self, totals: Totals) -> None:
        """Count one pass's statistics."""
        for name, one in totals.items():
            self._stats.setdefault(name, StatsAccumulator(self._needs)).merge_(one)

    def finish(self) -> dict[str, InputStats]:
        """The statistics of every linear.

        Raises: CalibrationError naming the linear that saw no token or a value that is not finite.
        """
        unseen = StatsAccumulator(self._needs)
        done: dict[str, InputStats] = {}
        for name in self._linears:
            leader = (self._leader or {}).get(name, name)
            done[name] = done[leader] if leader in done else self._stats.get(leader, unseen).finish(name)
        for pool in self._pools:
            everyone = cache(partial(merged, self._needs, self._stats, pool))
            for linear in pool:
                leader = (self._leader or {}).get(linear.name, linear.name)
                shared = done.get(leader)
                done[linear.name] = shared or fed(linear, self._stats.get(leader, unseen), everyone)
        return done

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
        if self._leader is None:
            self._pass.seen.append((name, inputs))
        if (self._leader is None or self._leader.get(name, name) == name) and inputs.numel():
            self._pass.totals.setdefault(name, StatsAccumulator(self._needs)).add_(inputs)
        if name == self._last:
            raise Enough
