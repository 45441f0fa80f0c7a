"""Keep masks of a model's linears, one bit a weight."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SHIFTS = torch.arange(8, dtype=torch.uint8)
_INTEGER_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element
_SELECTED_AT_ONCE = 1 << 18  # torch makes an 8-byte position of every weight it selects from


def pack_bits(keep: Tensor) -> Tensor:
    """(out, in) bool -> (out, ceil(in / 8)) uint8, lowest bit first; a last short byte is padded with zeros."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))  # far fewer passes
    out, columns = keep.shape
    padded = torch.nn.functional.pad(keep, (0, -columns % 8)) if columns % 8 else keep
    bits = padded.reshape(out, -1, 8).to(torch.uint8) << _SHIFTS.to(keep.device)
    return bits.sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """(out, ceil(in / 8)) uint8 -> (out, in) bool, the inverse of `pack_bits`."""
    if bits.device.type == "cpu" and bits.numel():
        unpacked = np.unpackbits(bits.numpy(), axis=1, count=columns, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    keep = (bits.unsqueeze(-1) >> _SHIFTS.to(bits.device)) & 1
    return keep.view(bits.shape[0], -1)[:, :columns].bool()


def raw(tensor: Tensor) -> Tensor:
    """The same memory seen as integers, so that moving and comparing it is exact: NaN and -0.0 included."""
    return tensor.detach().view(_INTEGER_OF[tensor.dtype.itemsize])


def take_kept(weight: Tensor, keep: Tensor) -> Tensor:
    """The kept values of an (out, in) weight in row-major order, (kept,), bit for bit."""
    rows = max(1, _SELECTED_AT_ONCE // max(1, keep.shape[1]))
    parts = zip(torch.split(raw(weight), rows), torch.split(keep, rows), strict=True)
    return torch.cat([values.masked_select(kept) for values, kept in parts]).view(weight.dtype)


def kept_shape(keep: Tensor) -> tuple[int, ...]:
    """The shape that kept values are stored in: (out, kept in a row) if every row keeps as many, else (kept,)."""
    counts = keep.sum(1, dtype=torch.int32)  # half the time of the default, int64
    if len(counts) and (counts == counts[0]).all():
        return len(counts), int(counts[0])
    return (int(counts.sum()),)


def put_kept(values: Tensor, keep: Tensor) -> Tensor:
    """The inverse of `take_kept`: an (out, in) weight, +0.0 wherever ``keep`` is False.

    ``values`` has as many elements as ``keep`` has True, in any shape.
    """
    flat = raw(values).reshape(-1)
    return torch.zeros(keep.shape, dtype=flat.dtype, device=flat.device).masked_scatter_(keep, flat).view(values.dtype)


def _off_heap(bits: Tensor) -> Tensor:
    """A CPU copy in pages of its own.

    Small tensors that stay, made between large ones that go, split up the heap until it no longer has room for the
    large ones: streaming a model past its masks would grow the process almost by the model's size.
    """
    pages = mmap.mmap(-1, max(1, bits.numel()))
    return torch.frombuffer(pages, dtype=torch.uint8)[: bits.numel()].view(bits.shape).copy_(bits)


@dataclass(frozen=True)
class PackedMask:
    """One mask as it is held and stored: (out, ceil(in / 8)) uint8 and the true number of columns."""

    bits: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's (out, in)."""
        return self.bits.shape[0], self.columns

    def keep(self) -> Tensor:
        """The (out, in) bool mask."""
        return unpack_bits(self.bits, self.columns)

    def kept(self) -> int:
        """Number of weights kept."""
        counts = torch.tensor([bin(b).count("1") for b in range(256)], dtype=torch.int64)
        return int((torch.bincount(self.bits.flatten().int(), minlength=256) * counts).sum())


@dataclass(frozen=True)
class StoredMask:
    """A mask left on disk: in the place of a PackedMask, and read at every access.

    Args:
        keep: Reads the (out, in) bool mask.
        shape: The weight's (out, in).
    """

    keep: Callable[[], Tensor]
    shape: tuple[int, int]

    @property
    def bits(self) -> Tensor:
        """(out, ceil(in / 8)) uint8."""
        return pack_bits(self.keep())

    @property
    def columns(self) -> int:
        """The true number of columns."""
        return self.shape[1]

    def kept(self) -> int:
        """Number of weights kept."""
        return int(self.keep().count_nonzero())


class MaskStore(Mapping[str, Tensor]):
    """Linear name -> (out, in) bool keep mask, True = kept; an eighth of a byte a weight in memory.

    Iterates in insertion order, which is the model's order.
    """

    def __init__(self, packed: Mapping[str, PackedMask | StoredMask] | None = None) -> None:
        self._packed: dict[str, PackedMask | StoredMask] = dict(packed or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._packed[name].keep()

    def __setitem__(self, name: str, keep: Tensor) -> None:
        if keep.dtype != torch.bool or keep.dim() != 2:
            raise TypeError(f"{name}: a mask is a (out, in) bool tensor, not {keep.dtype} {tuple(keep.shape)}")
        self._packed[name] = PackedMask(_off_heap(pack_bits(keep)), keep.shape[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def copy(self) -> MaskStore:
        """A store of its own with the same masks."""
        return MaskStore(self._packed)

    def packed(self, name: str) -> PackedMask | StoredMask:
        """The mask as bits, without unpacking it."""
        return self._packed[name]

    def sparsity(self) -> float:
        """Fraction of the masked linears' weights that is removed; 0 for an empty store."""
        total = sum(m.shape[0] * m.columns for m in self._packed.values())
        kept = sum(m.kept() for m in self._packed.values())
        return 1.0 - kept / total if total else 0.0

    def sha256(self) -> str:
        """Hash of all masks, independent of how they are stored: names sorted, with shapes and bits."""
        digest = hashlib.sha256()
        for name in sorted(self._packed):
            mask = self._packed[name]
            digest.update(f"{name} {mask.shape[0]} {mask.columns}\n".encode())
            digest.update(mask.bits.contiguous().numpy().tobytes())
        return digest.hexdigest()
