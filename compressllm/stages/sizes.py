"""Counts of numbers in a model, from its shapes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from compressllm.models.blocks import all_linears, find_blocks
from compressllm.models.bundle import Bundle


@dataclass(frozen=True)
class Sizes:
    """Counts of numbers in a model, and the bytes each has.

    Args:
        stored, computed: Bytes a number on disk, and in memory while it is computed with.
        outside: Numbers in what comes before the blocks: the embedding, mostly.
        largest, block, linear: Numbers in the largest tensor, block and prunable linear.
        sparse, parameters: Numbers in all prunable linears, and in all.
        grams: Numbers in the second moments of all inputs of a block, and ``gram`` in the largest.
        state: Numbers a token has in a block's forward pass.
        threads: Batches computed at once.
    """

    stored: int
    computed: int
    outside: int
    largest: int
    block: int
    linear: int
    sparse: int
    parameters: int
    grams: int
    gram: int
    hidden: int
    vocabulary: int
    blocks: int
    state: int
    saved: int
    threads: int

    @property
    def both(self) -> int:
        """Bytes of a number that is held as it is stored and as it is computed with."""
        return self.stored + (self.computed if self.computed != self.stored else 0)

    def copied(self, count: int) -> int:
        """Bytes of numbers that are brought from one dtype to the other, if these differ."""
        return count * self.stored if self.computed != self.stored else 0


def sizes_of(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> Sizes:
    """What the skeleton of a bundle's model says of its sizes."""
    model, found = bundle.model, find_blocks(bundle.model)
    tied = model.all_tied_weights_keys
    named = {name: one for name, one in model.named_parameters() if name not in tied}
    linears = all_linears(model)
    first = [linear.shape for name, linear in linears.items() if name.startswith(f"{found.name(0)}.")]
    inside = {name: one.numel() for name, one in named.items() if name.startswith(f"{found.prefix}.")}
    blocks = [
        sum(count for name, count in inside.items() if name.startswith(f"{found.name(index)}."))
        for index in range(len(found.modules))
    ]
    embedding = model.get_input_embeddings().weight
    # Linears are called with the same input by twos and threes: q, k and v; gate and up. Of as many inputs as the
    # hidden states have, o has one of its own.
    hidden = int(embedding.shape[1])
    widths = Counter(columns for _, columns in first)
    inputs = [width for width, count in widths.items() for _ in range(min(count, 3 if width == hidden else 1))]
    widest = max(widths)
    return Sizes(
        stored=bundle.stored_dtype.itemsize,
        computed=dtype.itemsize,
        outside=sum(one.numel() for name, one in named.items() if name not in inside and "head" not in name),
        largest=max(one.numel() for one in named.values()),
        block=max(blocks),
        linear=max(linear.shape[0] * linear.shape[1] for linear in linears.values()),
        sparse=sum(linear.shape[0] * linear.shape[1] for linear in linears.values()),
        parameters=sum(one.numel() for one in named.values()),
        grams=sum(width**2 for width in inputs),
        gram=widest**2,
        hidden=hidden,
        vocabulary=int(embedding.shape[0]),
        blocks=len(blocks),
        state=8 * hidden + 3 * widest,
        saved=8 * hidden + 4 * widest + sum(out for out, columns in first if columns == hidden) // 2,
        threads=torch.get_num_threads() if device.type == "cpu" else 1,
    )
