"""Work on the rows of a weight, which are independent of each other: on a CPU some rows a core at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from compressllm.core.parallel import for_chunks, map_batches

R = TypeVar("R")

#: Rows one core takes at a time. Few enough to stay in its cache, and fixed: results must not depend on the cores.
ROWS = 64


def each_rows(work: Callable[[slice], None], weight: Tensor) -> None:
    """Call ``work`` with slices that together are all rows of an (out, in) weight.

    The result is the same, bit for bit, whatever the number of threads. Elsewhere than on a CPU one call gets all rows.

    Args:
        work: Writes its result in place; calls may run at once, each on one thread, and record no gradients.
    """
    rows = weight.shape[0]
    step = ROWS if weight.device.type == "cpu" else max(1, rows)
    with torch.inference_mode():
        for_chunks(work, 0, rows, step, weight.device)


def on_one_thread(work: Callable[[], R], device: torch.device) -> R:
    """What ``work`` returns, computed on one thread of a CPU: LAPACK's last bits depend on the number of threads."""
    with torch.no_grad():
        return next(map_batches(lambda _: work(), 1, device))
