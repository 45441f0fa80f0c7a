"""Tensors in huge pages: a kernel that reads memory once spends a quarter of its time on small ones."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_ALIGNMENT = 64  # of a tensor: one cache line
_ARENA = 32 << 20  # mapped at a time; a tensor of half of it or more has a mapping of its own


class _Arena:
    """Hands out pieces of one mapping after the other. A mapping is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages, self._used = _huge_pages(0), 0

    def take(self, size: int) -> Tensor:
        if size * 2 >= _ARENA:
            return _huge_pages(size)[:size]
        with self._lock:
            if self._used + size > self._pages.numel():
                self._pages, self._used = _huge_pages(_ARENA), 0
            start = self._used
            self._used = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
            return self._pages[start : start + size]


def _huge_pages(size: int) -> Tensor:
    """(size or a little more,) uint8, zeros, in whole huge pages."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    # Python maps shared memory unless told otherwise, in which Linux ignores the advice.
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE, start, size)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=start, count=size)


_arena: _Arena | None = None


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros in huge pages, or in ordinary memory where a system has none."""
    global _arena
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    if _arena is None:
        _arena = _Arena()
    size = torch.Size(shape).numel() * dtype.itemsize
    return _arena.take(size).view(dtype).view(*shape)


def huge_bytes(tensor: Tensor) -> int:
    """How many bytes of the mapping that ``tensor`` lies in are in huge pages; 0 where the system does not tell."""
    address, within, total = tensor.data_ptr(), False, 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            head, _, _ = line.partition(" ")
            first, dash, last = head.partition("-")
            if dash:
                within = int(first, 16) <= address < int(last, 16)
            elif within and head == "AnonHugePages:":
                total = int(line.split()[1]) * 1024
    return total
