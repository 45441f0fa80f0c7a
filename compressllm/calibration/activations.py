"""The hidden states of all calibration windows, in memory or, past a limit, on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compressllm.core.atomic import naming
from compressllm.models.tensorfile import TensorSpec, read_tensor, write_tensor


class Activations:
    """A list of (batch, seqlen, hidden) CPU tensors that spills to a temporary file past a limit.

    Only one copy is ever kept: a block's outputs take the place of its inputs. The file is unlinked as soon as
    it is open, so nothing of it outlives the process.

    Args:
        shapes: Shape of each batch, known beforehand.
        dtype: Dtype of all of them.
        limit: Most bytes to hold in memory.
        folder: Where the file goes; None for the system's temporary folder.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, limit: int, folder: Path | None = None
    ) -> None:
        self._limit, self._folder = limit, folder
        self._specs = [TensorSpec(dtype, tuple(shape)) for shape in shapes]
        self._offsets = [sum(s.bytes for s in self._specs[:i]) for i in range(len(self._specs))]
        self.bytes = sum(spec.bytes for spec in self._specs)
        self.spilled = self.bytes > limit
        self._held: list[Tensor | None] = [None] * len(self._specs)
        self._file = tempfile.TemporaryFile(dir=folder) if self.spilled else None  # noqa: SIM115 (held open)
        if self._file is not None:
            os.ftruncate(self._file.fileno(), self.bytes)

    def empty_like(self) -> Activations:
        """As many batches of the same shapes, none of them filled."""
        return Activations([spec.shape for spec in self._specs], self._specs[0].dtype, self._limit, self._folder)

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of a batch."""
        return self._specs[index].shape

    def __len__(self) -> int:
        return len(self._specs)

    def __getitem__(self, index: int) -> Tensor:
        if self._file is not None:
            return read_tensor(self._file.fileno(), self._offsets[index], self._specs[index], "spilled activations")
        held = self._held[index]
        if held is None:
            raise IndexError(f"batch {index} has not been filled")
        return held

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self._file is not None:
            with naming(self._folder or Path(tempfile.gettempdir())):
                write_tensor(self._file.fileno(), self._offsets[index], value)
        else:
            self._held[index] = value.cpu()
