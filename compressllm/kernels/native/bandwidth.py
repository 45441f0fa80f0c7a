"""How fast this machine reads memory from end to end: the limit of every kernel that reads each weight once."""

from __future__ import annotations

import statistics
import time

import torch

from compressllm.kernels.native import pages
from compressllm.kernels.native.library import library


def read_bandwidth(size: int = 512 << 20, repeats: int = 5) -> float:
    """Bytes a second, the median of ``repeats`` reads of ``size`` bytes in huge pages by torch's number of threads.

    Args:
        size: A multiple of 64, well past the caches.

    Raises: BackendUnavailableError if there are no native kernels.
    """
    read = library().c.stream_read
    memory = pages.zeros((size,), torch.uint8).fill_(1)  # pages are given out when they are written to
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        read(memory.data_ptr(), size // 8)
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds)
