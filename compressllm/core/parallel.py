"""Work on independent batches: on a CPU several at a time, each on one core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

R = TypeVar("R")


def map_batches(work: Callable[[int], R], batches: int, device: torch.device, first_alone: bool = True) -> Iterator[R]:
    """Yield ``work(0), work(1), …`` in order.

    On a CPU as many batches run at once as torch has threads, each with its operators on one thread. That keeps all
    cores busy where operators split over cores spend their time waiting for each other, and it makes every result
    the same, bit for bit, whatever the number of threads. Elsewhere batches run one after the other.

    Args:
        work: Must not depend on the order of batches after the first. Runs in other threads.
        first_alone: Let the first batch be over before others begin, so that ``work`` may learn from it.
    """
    if device.type != "cpu":
        yield from map(work, range(batches))
        return
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for batch in range(batches):
                waiting.append(pool.submit(work, batch))
                if (first_alone and batch == 0) or len(waiting) > workers:  # results wait in memory, so only a few may
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(workers)  # the workers' setting is the default of threads begun later
