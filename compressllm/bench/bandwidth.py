"""How fast this machine reads memory from one end to the other: what a linear at one token is held against."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from compressllm.kernels.timing import interleaved

BYTES = 256 << 20
_SECONDS = 1.0


def reading(device: torch.device) -> Callable[[], Tensor]:
    """A call that reads `BYTES` of memory with all threads, and hardly computes."""
    memory = torch.ones(BYTES // 4, device=device)
    return functools.partial(torch.sum, memory)


def streaming_read(device: torch.device) -> float:
    """Bytes a second, the quickest of the calls made in a second: what the machine can do when it is left alone."""
    (times,) = interleaved({"read": reading(device)}, _SECONDS, device).values()
    return BYTES / min(times)
