"""One forward pass over all windows that stops before each group of linears until they have been changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressllm.core.pooling import finish_stats, pool_stats
from compressllm.core.ranks import ALONE, Ranks
from compressllm.core.stats import InputStats, Need, StatsAccumulator


class Stopped(Exception):
    """Raised inside a paused forward pass that is not to go on."""


class _Pass(threading.Thread):
    """The forward pass of one batch, in a thread of its own that runs only between `go` and `reached`."""

    def __init__(self, forward: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._forward = forward
        self._may_go, self._here = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._error: BaseException | None = None
        self._input: Tensor | None = None

    def run(self) -> None:
        torch.set_num_threads(1)  # as everywhere, a batch has one core
        self._may_go.acquire()
        try:
            if not self._stopped:
                self._forward()
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._here.release()

    def pause(self, inputs: Tensor) -> None:
        """Called within the pass: a linear is about to be called with ``inputs``."""
        self._input = inputs
        self._here.release()
        self._may_go.acquire()
        self._input = None
        if self._stopped:
            raise Stopped

    def go(self) -> None:
        """Let the pass run on."""
        self._may_go.release()

    def reached(self) -> Tensor | None:
        """Wait until it pauses, and give what the linear is about to be called with; None at its end."""
        self._here.acquire()
        if self._error is not None:
            raise self._error
        return self._input

    def stop(self) -> None:
        """End a pass that is paused or has not begun."""
        self._stopped = True
        self._may_go.release()
        self.join()


def step_through(
    linears: Mapping[str, nn.Module],
    groups: Sequence[Sequence[str]],
    needs: frozenset[Need],
    forward: Callable[[int], object],
    batches: int,
    ranks: Ranks = ALONE,
) -> Generator[dict[str, InputStats], None, None]:
    """Yield the statistics of one group of linears after another, from a single forward pass over all batches.

    The pass stands still before a group while its statistics are with the caller, who may change its weights; it goes
    on with them, so that later groups are calibrated on what the changed ones put out, and every product is computed
    once. Closed early, it ends where it stands.

    Args:
        linears: Name -> module whose first argument is the linear's input.
        groups: Names of linears that are called with the same tensor, in the order of their first calls; each linear
            is called exactly once in a pass.
        needs: Statistics to collect.
        forward: Puts one batch through the block. Runs in another thread.
        batches: Number of batches. All of them are in flight at once, with what a block holds on its way; as many run
            at one time as torch has threads.
        ranks: Processes that share the windows.

    Raises: CalibrationError naming the linear whose inputs are not finite.

    Source: the true-sequential order of GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774).
    """
    local = threading.local()

    def begin(batch: int) -> Callable[[], object]:
        def run() -> object:
            local.now = passes[batch]
            return forward(batch)

        return run

    def stop_here(module: nn.Module, args: tuple[Any, ...]) -> None:
        if (now := getattr(local, "now", None)) is not None:
            now.pause(args[0])

    threads = torch.get_num_threads()
    passes = [_Pass(begin(batch)) for batch in range(batches)]
    rounds = [passes[at : at + threads] for at in range(0, batches, threads)]
    handles = [linears[group[0]].register_forward_pre_hook(stop_here) for group in groups]
    for one in passes:
        one.start()
    try:
        for group in groups:
            stats = StatsAccumulator(needs)
            for together in rounds:
                for one in together:
                    one.go()
                # All of them stand still before the first is counted: the sums take every core.
                for inputs in [one.reached() for one in together]:
                    if inputs is not None:
                        stats.add_(inputs)
            device = next(linears[group[0]].parameters()).device
            yield finish_stats(pool_stats(ranks, dict.fromkeys(group, stats), device))
        for together in rounds:
            for one in together:
                one.go()
            for one in together:
                one.reached()
    finally:
        for handle in handles:
            handle.remove()
        for one in passes:
            one.stop()
        torch.set_num_threads(threads)  # the passes' setting is the default of threads begun later
