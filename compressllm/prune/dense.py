"""Walk a model before it is pruned, changing nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from compressllm.calibration.walker import WalkOptions, walk_blocks
from compressllm.core.errors import FormatError
from compressllm.core.protocols import DenseLinear
from compressllm.core.run import Run
from compressllm.core.stats import Need
from compressllm.models.blocks import find_blocks
from compressllm.models.bundle import Bundle
from compressllm.models.weights import LiveWeights, StreamedWeights, Weights


def dense_pass(
    bundle: Bundle,
    needs: frozenset[Need],
    windows: Tensor | None,
    dtype: torch.dtype,
    options: WalkOptions,
    run: Run,
    names: Collection[str],
) -> Iterator[tuple[str, Mapping[str, DenseLinear]]]:
    """Yield each block's name and those of its linears that are in ``names``; they are valid until the next.

    Args:
        needs: Input statistics to collect; without any, no forward is run.
        windows: (n, seqlen) token ids.

    Raises: FormatError for weights that are not finite; CalibrationError.
    """
    device = options.device
    weights: Weights = LiveWeights(bundle.model)
    if bundle.checkpoint is not None:
        weights = StreamedWeights(bundle.model, bundle.checkpoint, None, set(), dtype, device)
    blocks = walk_blocks(bundle.model, windows if needs else None, weights, options)
    for block in run.track(blocks, len(find_blocks(bundle.model).modules), "surveying"):
        chosen = [name for name in block.linears if name in names]
        for name in chosen:
            check_finite(name, weights.read(f"{name}.weight"))
        if not chosen:
            continue
        stats = block.collect(needs)
        yield block.name, {name: DenseLinear(_reader(weights, name, device), stats[name]) for name in chosen}


def _reader(weights: Weights, name: str, device: torch.device) -> Callable[[], Tensor]:
    return partial(lambda parameter: weights.read(parameter).to(device, torch.float32), f"{name}.weight")


def check_finite(name: str, weight: Tensor) -> None:
    """Raises: FormatError naming the linear if its weight holds NaN or infinity."""
    if weight.sum().isfinite():  # one pass; NaN and infinity never leave a sum
        return
    if bad := int(weight.isfinite().logical_not_().count_nonzero()):
        raise FormatError(f"{name}.weight: holds {bad} values that are not finite")
