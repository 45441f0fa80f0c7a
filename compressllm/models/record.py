"""The record of a walk: finished blocks, in the model or in a folder from which an interrupted walk resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressllm import __version__
from compressllm.core.gathered import Gathered
from compressllm.core.masks import MaskStore, PackedMask, pack_bits
from compressllm.core.pattern import NM, SparsityPattern
from compressllm.models.blocks import all_linears, find_blocks
from compressllm.models.bundle import Bundle, bundle_of
from compressllm.models.checkpoint import MASKS_NAME, Checkpoint
from compressllm.models.facts import Facts, LinearFacts
from compressllm.models.journal import Journal, Rows
from compressllm.models.linears import PrunableLinear
from compressllm.models.shards import ShardWriter, file_sha256
from compressllm.models.tensorfile import TensorFileWriter, TensorSpec
from compressllm.models.tensornames import tensor_names
from compressllm.models.weights import LiveWeights, StreamedWeights, Weights


class Record(Protocol):
    """Where a walk's results go as blocks are finished."""

    weights: Weights
    done: int
    """Blocks that an earlier, interrupted walk had finished."""
    rows: Rows
    """What was logged of finished blocks."""

    def finish(self, block: str, masks: Mapping[str, Tensor], rows: Rows) -> None:
        """A loaded block has its final weights and these (out, in) masks."""
        ...

    def close(self) -> Bundle:
        """All blocks are finished: the resulting bundle."""
        ...


class LiveRecord:
    """Results go into the model, in place."""

    def __init__(self, bundle: Bundle, patterns: Mapping[str, SparsityPattern]) -> None:
        self.weights: Weights = LiveWeights(bundle.model)
        self.done = 0
        self.rows: Rows = []
        self._bundle, self._patterns = bundle, patterns
        self._masks = bundle.masks.copy()

    def finish(self, block: str, masks: Mapping[str, Tensor], rows: Rows) -> None:
        """Keep masks and rows; the weights are where they belong already."""
        for name, keep in masks.items():
            self._masks[name] = keep
        self.rows += rows

    def close(self) -> Bundle:
        """The same model with its new masks."""
        patterns = {**self._bundle.patterns, **with_orders(self._patterns, self.rows)}
        return replace(self._bundle, masks=self._masks, patterns=patterns)


class FolderRecord:
    """Results go to a checkpoint folder, block by block; a killed walk resumes after its last finished block.

    The shards have their final layout from the start, so a finished block is written once and in its place.
    ``progress.json`` names a block only after its bytes are synced. A call that finds all of them finished only puts
    the checkpoint together.

    Args:
        bundle: A bundle with a checkpoint.
        patterns: Linear name -> pattern, of the linears that the walk makes sparse.
        folder: Existing folder; the checkpoint appears in it as ``model`` when the walk is over.
        fingerprint: Everything the results depend on. A record left with another fingerprint is refused.

    Raises: RunError for such a record, or a checkpoint without one; FormatError if the bundle lacks the mask of a
        sparse linear that the walk leaves as it is; OSError if the disk is full.
    """

    def __init__(
        self,
        bundle: Bundle,
        patterns: Mapping[str, SparsityPattern],
        folder: Path,
        fingerprint: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if bundle.checkpoint is None:
            raise TypeError("a FolderRecord needs a bundle whose weights are in a checkpoint")
        self._source, self._bundle = bundle.checkpoint, bundle
        self._patterns = {**bundle.patterns, **patterns}
        bundle.check_masks(but=patterns)
        self._journal = Journal(folder, {**fingerprint, **computed_on(self._source, dtype, device)})
        self.rows, self.done = self._journal.rows, len(self._journal.blocks)
        self._out = ShardWriter(self._journal.work, self._source.specs, begun=bool(self.done))
        stored_name = tensor_names(bundle.model, self._source)
        self._stored = {name: stored_name[f"{name}.weight"].removesuffix(".weight") for name in self._patterns}
        self._linears = all_linears(bundle.model)
        self._mask_file = TensorFileWriter(
            self._journal.work / MASKS_NAME,
            {
                self._stored[name]: TensorSpec(torch.uint8, (out, -(-columns // 8)))
                for name, (out, columns) in ((name, self._linears[name].shape) for name in self._patterns)
            },
            begun=bool(self.done),
        )
        self.weights: Weights = StreamedWeights(
            bundle.model, self._source, self._out, set(self._journal.blocks), dtype, device
        )

    def finish(self, block: str, masks: Mapping[str, Tensor], rows: Rows) -> None:
        """Write the block's weights and masks, then note that it is finished."""
        for name, keep in masks.items():
            self._mask_file.write(self._stored[name], pack_bits(keep).cpu())
        self._mask_file.sync()
        self._streamed.finish_(block)
        self._journal.note(block, rows)

    def close(self) -> Bundle:
        """Copy everything outside the blocks, move the folder into place and open it."""
        self._streamed.finish_rest_()
        walked = {row["linear"] for row in self.rows}
        for name in self._patterns:
            if name not in walked:  # sparse already, and left as it was
                self._mask_file.write(self._stored[name], self._bundle.masks.packed(name).bits)
        self._out.finish()
        written = {self._stored[name]: self._linears[name].shape[1] for name in self._patterns}
        masks = MaskStore({name: PackedMask(self._mask_file.read(name), columns) for name, columns in written.items()})
        self._mask_file.close()
        linears = {self._stored[name]: self._linears[name] for name in self._patterns}
        finish_sparse_folder(
            self._journal.work, self._source, linears, masks,
            {self._stored[name]: pattern for name, pattern in with_orders(self._patterns, self.rows).items()},
        )  # fmt: skip
        self._journal.finish()
        return bundle_of(Checkpoint(self._journal.final), self._bundle.tokenizer, self._bundle.model)

    @property
    def _streamed(self) -> StreamedWeights:
        if not isinstance(self.weights, StreamedWeights):
            raise TypeError("the record's weights were replaced")
        return self.weights


class FollowingRecord:
    """The record on a rank other than the first, whose `FolderRecord` it follows: reads, and writes nothing.

    Args:
        bundle: A bundle with a checkpoint.
        folder: The first rank's folder; its FolderRecord has been opened.
        done: Blocks that were finished when it was.
        rows: What was logged of them.
    """

    def __init__(
        self, bundle: Bundle, folder: Path, done: int, rows: Rows, dtype: torch.dtype, device: torch.device
    ) -> None:
        if bundle.checkpoint is None:
            raise TypeError("a FollowingRecord needs a bundle whose weights are in a checkpoint")
        self.done, self.rows = done, list(rows)
        self._bundle, self._final = bundle, folder / "model"
        blocks = find_blocks(bundle.model)
        finished = {blocks.name(index) for index in range(done)}
        self._out = ShardWriter(folder / "model.partial", bundle.checkpoint.specs, begun=True)  # only read
        self.weights: Weights = StreamedWeights(bundle.model, bundle.checkpoint, self._out, finished, dtype, device)

    def finish(self, block: str, masks: Mapping[str, Tensor], rows: Rows) -> None:
        """Keep the rows of a finished block; the first rank writes it."""
        self.rows += rows

    def close(self) -> Bundle:
        """Open the checkpoint that the first rank has put into place."""
        self._out.close()
        return bundle_of(Checkpoint(self._final), self._bundle.tokenizer, self._bundle.model)


def with_orders(patterns: Mapping[str, SparsityPattern], rows: Rows) -> dict[str, SparsityPattern]:
    """Patterns as they were asked for -> in the orders of inputs that rows of linears tell of."""
    orders = {row["linear"]: row["order"] for row in rows if "order" in row}
    return {
        name: Gathered.read(pattern, orders[name]) if name in orders and isinstance(pattern, NM) else pattern
        for name, pattern in patterns.items()
    }


def finish_sparse_folder(
    folder: Path,
    source: Checkpoint,
    linears: Mapping[str, PrunableLinear],
    masks: MaskStore,
    patterns: Mapping[str, SparsityPattern],
) -> None:
    """Make a checkpoint of a folder whose weights and masks have been written: side files, then ``compressllm.json``.

    Args:
        source: What it was made from.
        linears: Stored name -> linear, of those that are sparse; ``masks`` and ``patterns`` have the same names.
    """
    source.copy_side_files(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    Facts(
        written_by=__version__,
        linears={
            name: LinearFacts(pattern=patterns[name], shape=linear.shape, transposed=linear.transposed)
            for name, linear in linears.items()
        },
        masks_sha256=masks.sha256(),
        source={**source.origin, "folder": source.folder.name},
        sha256={path.name: file_sha256(path) for path in files},
    ).write(folder)


def computed_on(source: Checkpoint | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What results depend on besides settings and text; part of a fingerprint."""
    return {"dtype": str(dtype), "device": device.type, "source": _identity(source) if source else None}


def _identity(checkpoint: Checkpoint) -> list[list[Any]]:
    """Cheap stand-in for the checkpoint's hash: name, size and modification time of its files."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in checkpoint.files]
