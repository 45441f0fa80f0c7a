"""Hooks that collect statistics of linears' inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from compressllm.calibration.inputs import Enough
from compressllm.core.stats import InputStats, Need, StatsAccumulator


class InputWatch:
    """Collects the input statistics of some linears while it is entered.

    Linears that are called with the same tensor (q, k and v; gate and up) share one accumulator, found in the
    first pass. From the second pass on, a pass in which all linears are called once ends at the last of them.

    Args:
        linears: Name -> linear.
        needs: Statistics to collect.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], needs: frozenset[Need]) -> None:
        self._linears, self._needs = linears, needs
        self._leader: dict[str, str] = {}
        self._stats: dict[str, StatsAccumulator] = {}
        self._seen: list[tuple[str, Tensor]] = []
        self._order: list[str] = []
        self._last: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> InputWatch:
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def next_pass(self) -> None:
        """Say that a new forward pass begins."""
        if self._order and self._last is None and Counter(self._order) == Counter(self._linears.keys()):
            self._last = self._order[-1]
        self._order.clear()
        self._seen.clear()

    def finish(self) -> dict[str, InputStats]:
        """The statistics of every linear.

        Raises: CalibrationError naming the linear that saw no token or a value that is not finite.
        """
        done = {name: stats.finish(name) for name, stats in self._stats.items()}
        missing = StatsAccumulator(self._needs)
        return {
            name: done[self._leader[name]] if name in self._leader else missing.finish(name) for name in self._linears
        }

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            self._order.append(name)
            if name not in self._leader:
                # Identity, not equality: the tensors seen in this pass are held, so none can be a reused one.
                self._leader[name] = next((first for first, seen in self._seen if seen is inputs), name)
                self._stats.setdefault(self._leader[name], StatsAccumulator(self._needs))
                self._seen.append((name, inputs))
            if self._leader[name] == name:
                self._stats[name].add_(inputs)
            if name == self._last:
                raise Enough

        return hook
