"""How fast this machine reads memory from one end to the other: what a linear at one token is held against."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from compressllm.kernels.native.library import library, unavailable
from compressllm.kernels.native.pages import zeros
from compressllm.kernels.timing import interleaved

BYTES = 256 << 20
_SECONDS = 1.0


def reading(device: torch.device) -> Callable[[], object]:
    """A call that reads `BYTES` of memory with all threads, and hardly computes."""
    if device.type == "cpu" and not unavailable():
        pages = zeros((BYTES // 8,), torch.int64).fill_(1)
        return functools.partial(_read, pages)
    return functools.partial(torch.sum, torch.ones(BYTES // 4, device=device))


def _read(pages: Tensor) -> None:
    library().c.stream_read(pages.data_ptr(), pages.numel())


def streaming_read(device: torch.device) -> float:
    """Bytes a second, the quickest of the calls made in a second: what the machine can do when it is left alone."""
    (times,) = interleaved({"read": reading(device)}, _SECONDS, device).values()
    return BYTES / min(times)
