"""Where a model with reordered channels is put: into itself, or tensor by tensor into a new checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compressllm.core.atomic import put_in_place
from compressllm.core.errors import FormatError, RunError
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle, bundle_of
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.facts import write_dense_facts
from compressllm.models.shards import ShardWriter, file_sha256
from compressllm.models.tensorfile import TensorFileWriter, TensorSpec
from compressllm.models.tensornames import tensor_names
from compressllm.models.weights import LiveWeights, StreamedWeights, Weights
from compressllm.prune.fold import Folds
from compressllm.prune.sameness import measure_difference

PERMUTATIONS_NAME = "permutations.safetensors"


class Refolded(Protocol):
    """A model on its way to other orders of channels."""

    weights: Weights
    """The model's weights as they were."""

    def fold_(self, folds: Folds, ids: Tensor) -> float:
        """Reorder the channels; the largest relative difference this makes to what blocks and head compute.

        Args:
            ids: (windows, seqlen) token ids to compare on.

        Raises: UnsupportedModelError if it is more than rounding.
        """
        ...

    def close(self) -> tuple[Bundle, str | None]:
        """The resulting bundle, and the hash of the file of permutations if one was written."""
        ...

    def abandon_(self) -> None:
        """Leave nothing of what was begun."""
        ...


class LiveRefolded:
    """The model itself, changed in place."""

    def __init__(self, bundle: Bundle, run: Run) -> None:
        self.weights: Weights = LiveWeights(bundle.model)
        self._bundle, self._run = bundle, run
        self._folds: Folds | None = None

    def fold_(self, folds: Folds, ids: Tensor) -> float:
        """Reorder each parameter once, however many names it has."""
        self._each_(folds.apply, folds)
        self._folds = folds
        state = self._bundle.model.state_dict()
        return measure_difference(
            self._bundle.model,
            set(state),
            before=lambda name: folds.undo(name, state[name]),
            after=state.__getitem__,
            stream=folds.stream,
            ids=ids,
        )

    def close(self) -> tuple[Bundle, str | None]:
        """The same bundle."""
        if self._folds is None or self._run.folder is None:
            return self._bundle, None
        return self._bundle, _write_permutations(self._folds.orders, self._run.folder)

    def abandon_(self) -> None:
        """Put the channels back."""
        if self._folds is not None:
            self._each_(self._folds.undo, self._folds)

    def _each_(self, change: Callable[[str, Tensor], Tensor], folds: Folds) -> None:
        done: set[int] = set()
        for name in sorted(folds.tensors):
            parameter = self._bundle.model.get_parameter(name)
            if id(parameter) not in done:
                done.add(id(parameter))
                parameter.data.copy_(change(name, parameter.data))


class WrittenRefolded:
    """A new checkpoint in ``run.folder``, written tensor by tensor; it appears there as ``model`` when it is whole.

    Raises: RunError if there is one already; FormatError without a folder; OSError if the disk is full.
    """

    def __init__(self, bundle: Bundle, source: Checkpoint, run: Run, dtype: torch.dtype, device: torch.device) -> None:
        if run.folder is None:
            raise FormatError("permuting a checkpoint writes a checkpoint: give the run a folder")
        self._bundle, self._source, self._folder = bundle, source, run.folder
        self._final, self._work = run.folder / "model", run.folder / "model.partial"
        if self._final.exists():
            raise RunError(f"{self._final}: exists already; give a new folder")
        shutil.rmtree(self._work, ignore_errors=True)  # what a killed call left
        self._work.mkdir()
        self._out = ShardWriter(self._work, source.specs)
        self._stored_name = tensor_names(bundle.model, source)
        self._folds: Folds | None = None
        self.weights: Weights = StreamedWeights(bundle.model, source, self._out, set(), dtype, device)

    def fold_(self, folds: Folds, ids: Tensor) -> float:
        """Write every tensor, and compare what was written with the source."""
        self._folds = folds
        name_of = {stored: name for name, stored in self._stored_name.items()}
        for stored in self._source.specs:
            tensor = self._source.read(stored)
            self._out.write(stored, folds.apply(name_of[stored], tensor) if stored in name_of else tensor)
        self._out.sync()
        return measure_difference(
            self._bundle.model,
            set(self._stored_name),
            before=lambda name: self._source.read(self._stored_name[name]),
            after=lambda name: self._out.read(self._stored_name[name]),
            stream=folds.stream,
            ids=ids,
        )

    def close(self) -> tuple[Bundle, str | None]:
        """Put the checkpoint together, move it into place and open it."""
        if self._folds is None:
            raise TypeError("nothing was folded")
        self._out.finish()
        self._source.copy_side_files(self._work)
        sha256 = _write_permutations(self._folds.orders, self._work)
        source = {**self._source.origin, "folder": self._source.folder.name, "permutations_sha256": sha256}
        write_dense_facts(self._work, source)
        shutil.copyfile(self._work / PERMUTATIONS_NAME, self._folder / PERMUTATIONS_NAME)
        put_in_place(self._work, self._final)
        return bundle_of(Checkpoint(self._final), self._bundle.tokenizer, self._bundle.model), sha256

    def abandon_(self) -> None:
        """Remove what was written."""
        self._out.close()
        shutil.rmtree(self._work, ignore_errors=True)


def _write_permutations(orders: Mapping[str, Tensor], folder: Path) -> str:
    """Write the (sets, size) orders as int32; the file's hash."""
    path = folder / PERMUTATIONS_NAME
    path.unlink(missing_ok=True)
    layout = {name: TensorSpec(torch.int32, tuple(order.shape)) for name, order in orders.items()}
    writer = TensorFileWriter(path, layout)
    for name, order in orders.items():
        writer.write(name, order.int())
    writer.close()
    return file_sha256(path)
