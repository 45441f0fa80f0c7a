"""What modules of a block are given by calibration text, and tables of how large it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressllm.core.errors import CalibrationError
from compressllm.core.protocols import BlockPass

_ENTRIES = 1001  # of a table of quantiles: every thousandth
_VALUES = 1 << 22  # at most so many are sorted, tokens being left out evenly


def inputs_of(block: BlockPass, modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Of every batch (windows, seqlen, in), what each module is called with; flattened batches get their shape back."""
    seen: dict[int, Tensor] = {}

    def note(at: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen.update({at: args[0]})

    handles = [module.register_forward_pre_hook(note(at)) for at, module in enumerate(modules)]
    try:
        for out in block.outputs():
            yield [seen[at].reshape(*out.shape[:-1], -1) for at in range(len(modules))]
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def magnitude_table(batches: Sequence[Tensor], where: str) -> Tensor:
    """(1001,) float32: the quantiles of ``|x|`` from 0 to 1, over all values of (..., n) tensors.

    Raises: CalibrationError if there is none, or one is not finite.
    """
    rows = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches]) if batches else torch.empty(0, 1)
    if not len(rows) or not rows.isfinite().all():
        raise CalibrationError(f"{where}: saw no token, or a value that is not finite, in calibration")
    rows = rows[:: 1 + rows.numel() // _VALUES]
    ordered = rows.abs().float().flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, _ENTRIES, dtype=torch.float64).round().long()
    return ordered[places.to(ordered.device)].cpu()


def at_quantile(table: Tensor, fraction: float) -> float:
    """The magnitude that ``fraction`` of the values lie at or below; -1 for none of them, so that all are above."""
    if fraction <= 0:
        return -1.0
    place = min(1.0, fraction) * (len(table) - 1)
    low = min(int(place), len(table) - 2)
    return float(torch.lerp(table[low], table[low + 1], place - low))
