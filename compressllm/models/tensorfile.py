"""Safetensors files read tensor by tensor and written in place, so that neither side holds a second copy.

The official reader maps the whole file; reading by offset instead keeps peak memory to the tensors in
use, and turns a truncated file into an error rather than a bus fault.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compressllm.core.atomic import naming
from compressllm.core.errors import FormatError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 1 << 24  # a hundred thousand tensors; JSON takes up to thirty times as much memory once read


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class _Header:
    specs: dict[str, TensorSpec]
    offsets: dict[str, int]  # from the start of the file
    metadata: dict[str, str]
    end: int


class TensorFile:
    """A safetensors file open for reading.

    Raises: FormatError if it is missing, truncated, or its header does not describe it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
            self.close = weakref.finalize(self, os.close, self._fd)  # once, at the latest when the object goes
            self._header = _parse_header(self._fd, path)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensor name -> dtype and shape, in file order."""
        return self._header.specs

    @property
    def metadata(self) -> dict[str, str]:
        """The header's free-form strings."""
        return self._header.metadata

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor with the bytes stored under ``name``."""
        spec = self._header.specs[name]
        return read_tensor(self._fd, self._header.offsets[name], spec, str(self.path))


class TensorFileWriter:
    """A safetensors file whose layout is fixed at the start and whose tensors are written in any order.

    The whole size is reserved at once, so a full disk is found before the work and not after it. A file left
    by an interrupted writer with the same layout is taken up as it is.

    Args:
        begun: Whether there must be such a file, since work that is finished is in it.

    Raises: FormatError if a file with another layout is in the way, or one that was begun is gone; OSError, naming the
        file, if the disk is full.
    """

    def __init__(
        self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None, *, begun: bool = False
    ) -> None:
        self.path = path
        if begun and not (path.exists() and path.stat().st_size):
            raise FormatError(
                f"{path}: is gone, and finished work with it; remove {path.parent.parent} to do that stage again"
            )
        header, self._header = _make_header(layout, {"format": "pt", **(metadata or {})})
        existed = path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if existed and os.fstat(self._fd).st_size > 0:
                if os.pread(self._fd, len(header), 0) != header or os.fstat(self._fd).st_size != self._header.end:
                    raise FormatError(f"{path}: was left by a run with another layout; remove it")
            else:
                with naming(path):
                    reserve(self._fd, self._header.end)
                    write_bytes(self._fd, 0, memoryview(header))
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` in its place. Raises FormatError if it is not what the layout says."""
        spec = self._header.specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise FormatError(
                f"{self.path.name}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the layout says {spec.dtype} {spec.shape}"
            )
        with naming(self.path):
            write_tensor(self._fd, self._header.offsets[name], tensor)

    def read(self, name: str) -> Tensor:
        """Read back a tensor written before, by this writer or the interrupted one it took up."""
        return read_tensor(self._fd, self._header.offsets[name], self._header.specs[name], str(self.path))

    def sync(self) -> None:
        """Make what was written so far survive a power cut."""
        with naming(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Sync and close."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1


def read_tensor(fd: int, offset: int, spec: TensorSpec, where: str) -> Tensor:
    """Read one tensor at ``offset`` of an open file. Raises FormatError if the file ends before it."""
    raw = torch.empty(spec.bytes, dtype=torch.uint8)
    view = raw.numpy().data
    done = 0
    while done < len(view):  # one call moves at most 2 GiB on Linux
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise FormatError(f"{where}: ends {len(view) - done} bytes early")
        done += got
    return raw.view(spec.dtype).view(spec.shape) if spec.bytes else torch.empty(spec.shape, dtype=spec.dtype)


def write_tensor(fd: int, offset: int, tensor: Tensor) -> None:
    """Write a tensor's bytes at ``offset`` of an open file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        write_bytes(fd, offset, flat.view(torch.uint8).numpy().data)


def write_bytes(fd: int, offset: int, view: memoryview) -> None:
    """Write all of ``view`` at ``offset``; one call moves at most 2 GiB on Linux."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def reserve(fd: int, size: int) -> None:
    """Give a file its size, and the disk blocks for it where the system can. Raises OSError if it is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


def _make_header(layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, _Header]:
    # Widest dtypes first keeps every tensor aligned to its item size, as the official writer does.
    names = sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    begins: dict[str, int] = {}
    for name in names:
        spec = layout[name]
        entries[name] = {
            "dtype": _NAME_OF[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.bytes],
        }
        begins[name] = begin
        begin += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    specs = {name: layout[name] for name in names}
    offsets = {name: len(head) + at for name, at in begins.items()}
    return head, _Header(specs, offsets, dict(metadata), len(head) + begin)


def _parse_header(fd: int, path: Path) -> _Header:
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise FormatError(f"{path}: is not a whole safetensors file: {size} bytes, header of {length}; fetch it again")
    try:
        entries = json.loads(os.pread(fd, length, 8))
        metadata = {str(key): str(value) for key, value in (entries.pop("__metadata__", None) or {}).items()}
        specs, offsets, spans = {}, {}, []
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise FormatError(f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported")
            spec = TensorSpec(DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]))
            begin, end = (int(at) for at in entry["data_offsets"])
            if min((begin, *spec.shape)) < 0 or end - begin != spec.bytes:
                raise FormatError(f"{path}: tensor {name} has {end - begin} bytes, its shape needs {spec.bytes}")
            specs[name], offsets[name] = spec, 8 + length + begin
            spans.append((begin, end, name))
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: has a damaged safetensors header ({error}); fetch it again") from None
    last = 0
    for begin, end, name in sorted(spans):
        if begin < last:
            raise FormatError(f"{path}: tensor {name} overlaps the one before it; fetch the file again")
        last = max(last, end)
    if 8 + length + last > size:
        raise FormatError(f"{path}: is truncated: {size} bytes of {8 + length + last}; fetch it again")
    return _Header(specs, offsets, metadata, 8 + length + last)
