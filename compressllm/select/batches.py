"""Work on many texts in batches of like length, each result kept as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from compressllm.core.cache import cache_folder
from compressllm.core.parallel import map_batches
from compressllm.core.run import Run
from compressllm.select.vectorcache import VectorCache, content_name

# Tokens in a batch, padding counted. A CPU runs one batch a core; more tokens gain it nothing.
_TOKENS: Final = {"cpu": 512, "cuda": 8192}


def in_batches(
    compute: Callable[[Sequence[int]], Tensor],
    lengths: Sequence[int],
    keys: Sequence[bytes],
    width: int,
    kept_as: Sequence[object] | None,
    device: torch.device,
    run: Run,
    label: str,
) -> Tensor:
    """(n, width) float32: a vector of every item, from earlier runs or computed.

    Items go into batches by their lengths alone, and a batch is computed as a whole or not at all; so a run that was
    killed and begun again computes the same batches, to the same bits.

    Args:
        compute: (b, width) vectors of the items of a batch; called in other threads.
        keys: Content hash of each item.
        kept_as: What the vectors depend on besides the items, the name of their file; None keeps nothing.
    """
    cache = VectorCache(None if kept_as is None else _file(kept_as), width)
    batches = by_length(lengths, _TOKENS[device.type])
    vectors = torch.empty(len(keys), width)
    left = []
    for batch in batches:
        if (known := cache.get([keys[item] for item in batch])) is None:
            left.append(batch)
        else:
            vectors[batch] = known
    computed = map_batches(lambda at: compute(left[at]), len(left), device)
    for batch, made in zip(left, run.track(computed, len(left), label) if left else (), strict=True):
        vectors[batch] = made
        cache.append([keys[item] for item in batch], made)
    return vectors


def by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Items in batches of at most so many tokens, padding counted, shortest first; a longer one is alone."""
    batches: list[list[int]] = [[]]
    for item in sorted(range(len(lengths)), key=lambda item: (lengths[item], item)):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[item] > tokens:
            batches.append([])
        batches[-1].append(item)
    return batches if batches[0] else []


def _file(kept_as: Sequence[object]) -> Path:
    return cache_folder() / "select" / f"{kept_as[0]}-{content_name(kept_as)}.bin"
