"""Packed: kept values and one bit a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressllm.core.errors import FormatError
from compressllm.core.masks import kept_shape, pack_bits, put_kept, take_kept, unpack_bits
from compressllm.core.protocols import FORMATS


@FORMATS.register("packed")
@dataclass(frozen=True)
class Packed:
    """Kept values and one bit a weight, any pattern; at 2:4 in 16 bit 9/16 of the dense size.

    ``{name}.values`` has the weight's dtype and holds the kept values in row-major order: (out, kept in a row) if
    every row keeps as many, so that rows can be sharded, else (kept,). ``{name}.bitmask`` is uint8
    (out, ceil(in / 8)): bit j, lowest first, of byte b is column 8 b + j. A reader trusts the mask: a kept value may
    be zero, +0.0 or -0.0. ``{name}.weight`` is empty, (0,): a loader that does not know the format stumbles over
    its shape, where stock transformers would go on with random weights if it found no weight at all.

    Source: the mathematics of compressed-tensors' ``sparse-24-bitmask``, freed from 2:4.
    """

    tensors: ClassVar[tuple[str, ...]] = ("values", "bitmask", "weight")

    def layout(self, name: str, dtype: torch.dtype, keep: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of the three tensors."""
        out, columns = keep.shape
        return {
            f"{name}.values": (dtype, kept_shape(keep)),
            f"{name}.bitmask": (torch.uint8, (out, -(-columns // 8))),
            f"{name}.weight": (dtype, (0,)),
        }

    def pack(self, name: str, weight: Tensor, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The three tensors."""
        yield f"{name}.values", take_kept(weight, keep).view(kept_shape(keep))
        yield f"{name}.bitmask", pack_bits(keep)
        yield f"{name}.weight", weight.new_empty(0)

    def unpack(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor:
        """The (out, in) weight. Raises FormatError if values, mask and shape do not agree."""
        values, keep = read(f"{name}.values"), self.mask(name, read, shape)
        kept = int(keep.count_nonzero())
        if values.numel() != kept:
            raise FormatError(f"{name}: has {values.numel()} values, its bitmask keeps {kept}; export the model again")
        if tuple(values.shape) != kept_shape(keep):
            raise FormatError(
                f"{name}: values have shape {tuple(values.shape)}, its bitmask implies {kept_shape(keep)}; "
                "export the model again"
            )
        return put_kept(values, keep)

    def mask(self, name: str, read: Callable[[str], Tensor], shape: tuple[int, int]) -> Tensor:
        """The (out, in) bool mask. Raises FormatError if it does not fit the shape."""
        bits, (out, columns) = read(f"{name}.bitmask"), shape
        needed = (out, -(-columns // 8))
        if bits.dtype != torch.uint8 or tuple(bits.shape) != needed:
            raise FormatError(
                f"{name}: bitmask is {bits.dtype} {tuple(bits.shape)}, a weight of {out} x {columns} needs uint8 "
                f"{needed}; export the model again"
            )
        if columns % 8 and (bits[:, -1] >> columns % 8).any():
            raise FormatError(f"{name}: bitmask keeps columns past the last, {columns}; export the model again")
        return unpack_bits(bits, columns)
