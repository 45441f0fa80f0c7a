"""Work on independent batches: on a CPU several at a time, each on one core."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

R = TypeVar("R")


def map_batches(
    work: Callable[[int], R], batches: int, device: torch.device, *, first_alone: bool = True, rounds: bool = False
) -> Iterator[R]:
    """Yield ``work(0), work(1), …`` in order.

    On a CPU as many batches run at once as torch has threads, each with its operators on one thread. That keeps all
    cores busy where operators split over cores spend their time waiting for each other, and it makes every result
    the same, bit for bit, whatever the number of threads. Elsewhere batches run one after the other.

    Args:
        work: Must not depend on the order of batches after the first. Runs in other threads.
        first_alone: Let the first batch be over before others begin, so that ``work`` may learn from it.
        rounds: Nothing runs while a result is in the caller's hands, who may then use all cores.
    """
    workers = torch.get_num_threads()
    if device.type != "cpu" or workers == 1:  # one within the work of another too
        yield from map(work, range(batches))
        return
    pool = _pool(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for batch in range(batches):
            waiting.append(pool.submit(work, batch))
            alone = first_alone and batch == 0
            if rounds and (alone or len(waiting) == workers):
                wait(waiting)
                yield from _drain(waiting)
            elif alone or len(waiting) > workers:  # results wait in memory, so only a few may
                yield waiting.popleft().result()
        yield from _drain(waiting)
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)  # those that have begun
        torch.set_num_threads(workers)  # the workers' setting is the default of threads begun later


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Kept from call to call: solvers share out work of a millisecond, and a new thread has cold buffers."""
    return ThreadPoolExecutor(workers, "batch", initializer=_on_one_core)


def _on_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first call in a thread makes the setting its own; later ones of others pass it by


def _drain(waiting: deque[Future[R]]) -> Iterator[R]:
    while waiting:
        yield waiting.popleft().result()


def for_chunks(
    work: Callable[[slice], object],
    start: int,
    stop: int,
    size: int,
    device: torch.device,
    *,
    first_alone: bool = False,
) -> None:
    """Run ``work`` on slices of ``start`` to ``stop``, each of ``size`` but the last, as `map_batches` runs batches.

    Chunks do not depend on the number of threads, so neither do the bits of what is computed from them: libraries of
    linear algebra promise that only as long as the number of threads stays the same.

    Args:
        work: Changes no memory that another chunk touches. Runs in the caller's inference mode.
        first_alone: Be done with the first chunk before the others begin.
    """
    inference = torch.is_inference_mode_enabled()  # which threads do not inherit

    def run(chunk: int) -> None:
        at = start + chunk * size
        with torch.inference_mode(inference):
            work(slice(at, min(at + size, stop)))

    for _ in map_batches(run, -((start - stop) // size), device, first_alone=first_alone):
        pass
