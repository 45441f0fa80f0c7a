"""Write a checkpoint folder in another format, tensor by tensor, and prove that nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compressllm import __version__
from compressllm.core.detect import find_sparsity, pattern_of
from compressllm.core.errors import FormatError
from compressllm.core.masks import MaskStore, raw
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import FORMATS, Format
from compressllm.core.registry import build
from compressllm.core.run import Track, untracked
from compressllm.core.stamp import stamp_config
from compressllm.core.stockcodes import FORMAT
from compressllm.export.modelcard import run_of, write_card
from compressllm.export.sizes import exported_sizes
from compressllm.export.stock import export_stock
from compressllm.export.whole import appears_whole
from compressllm.models.blocks import all_linears
from compressllm.models.checkpoint import MASKS_NAME, Checkpoint, write_masks
from compressllm.models.facts import Facts, LinearFacts
from compressllm.models.linears import held_otherwise
from compressllm.models.loading import skeleton
from compressllm.models.shards import MAX_SHARD_BYTES, ShardWriter, file_sha256
from compressllm.models.tensorfile import TensorSpec
from compressllm.models.tensornames import tensor_names


class _Sparse(NamedTuple):
    """The sparse linears, by their names in the checkpoint and in the model's order.

    ``transposed`` names the linears, sparse or not, whose weights are stored as (in, out).
    """

    masks: MaskStore
    patterns: dict[str, SparsityPattern]
    transposed: frozenset[str]

    def turned(self, owner: str, weight: Tensor) -> Tensor:
        """The stored weight of a linear as (out, in), or an (out, in) weight as it is stored."""
        return weight.T if owner in self.transposed else weight


def export_model(
    source: Checkpoint,
    out: Path,
    format: str,
    progress: Track = untracked,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Facts:
    """Write a checkpoint to a new folder in another format. At most a few tensors are in memory at a time.

    The folder appears whole or not at all. Before it does, every tensor is read back from it and compared with the
    source, byte by byte. Sparse linears are those the source holds masks of; if it holds none, those whose zeros
    follow a pattern (`find_sparsity`).

    Args:
        source: Dense with masks, dense with zeros, or in any of our formats.
        out: Must not exist, or be an empty folder.
        format: A registered format, ``dense`` or ``packed``; or ``compressed-tensors``, see `export_stock`.
        progress: Shows how far it is.
        max_shard_bytes: Where a weight file is split.

    Raises: RunError if another process writes to ``out``; FormatError if ``out`` holds something or cannot be written,
        if there is nothing to pack, or what is to be packed is quantised, if a mask and its weight disagree, or if
        what was read back differs; UnsupportedModelError if the model cannot be built.
    """
    if format == FORMAT:
        return export_stock(source, out, progress, max_shard_bytes)
    chosen: Format = build(FORMATS, format)
    variant = None if chosen.tensors == ("weight",) else format
    if variant and source.facts and source.facts.schemes:
        raise FormatError(f"{source.folder}: is quantised and packed already; to have plain weights, export it dense")
    with appears_whole(out) as work:
        sparse = _sparse_linears(source, progress)
        if variant and not sparse.masks:
            raise FormatError(
                f"{source.folder}: has no sparse linear, so there is nothing to store {format}; "
                "prune it first, or export it dense"
            )
        facts = Facts(
            written_by=__version__,
            format=format,
            variant=variant,
            linears={
                name: LinearFacts(
                    pattern=pattern, shape=sparse.masks.packed(name).shape, transposed=name in sparse.transposed
                )
                for name, pattern in sparse.patterns.items()
            },
            masks_sha256=sparse.masks.sha256() if sparse.masks else None,
            source=source.origin,
        )
        facts.write(work)
        _write_side_files(source, work, facts)
        _write_tensors(source, work, chosen, sparse, variant, max_shard_bytes, progress)
        if sparse.masks and not variant:
            write_masks(work / MASKS_NAME, sparse.masks)
        written = Checkpoint(work)
        _compare(source, written, sparse, progress)
        facts = facts.model_copy(update={"sha256": {path.name: file_sha256(path) for path in written.files}})
        write_card(work, facts, exported_sizes(written).ratio, run_of(source.folder))
        facts.write(work)
    return facts


def _sparse_linears(source: Checkpoint, progress: Track) -> _Sparse:
    """The linears the source holds masks of; if it holds none, those whose zeros follow a pattern."""
    model = skeleton(source)
    stored_name = tensor_names(model, source)
    turned = [name for name, linear in held_otherwise(model).items() if linear.transposed and name in stored_name]
    transposed = frozenset(stored_name[name].removesuffix(".weight") for name in turned)
    masks = source.masks()
    if masks:
        known = source.facts.patterns if source.facts else {}
        patterns = {name: known.get(name) or pattern_of(masks[name]) for name in masks}
        return _Sparse(masks, patterns, transposed)
    sparse = _Sparse(masks, {}, transposed)
    linears = [stored_name[f"{name}.weight"].removesuffix(".weight") for name in all_linears(model)]
    for name in progress(linears, len(linears), "looking for zeros"):
        if sparsity := find_sparsity(sparse.turned(name, source.read(f"{name}.weight")).contiguous()):
            sparse.patterns[name], masks[name] = sparsity
    return sparse


def _write_tensors(
    source: Checkpoint,
    work: Path,
    chosen: Format,
    sparse: _Sparse,
    variant: str | None,
    max_shard_bytes: int,
    progress: Track,
) -> None:
    layout: dict[str, TensorSpec] = {}
    for name, spec in source.specs.items():
        owner = _sparse_owner(name, sparse)
        if owner is None:
            layout[name] = spec
        else:
            parts = chosen.layout(owner, spec.dtype, sparse.masks[owner])
            layout.update({part: TensorSpec(*each) if variant else spec for part, each in parts.items()})
    writer = ShardWriter(work, layout, variant, max_shard_bytes)
    try:
        for name in progress(source.specs, len(source.specs), "writing"):
            owner = _sparse_owner(name, sparse)
            if owner is None:
                writer.write(name, source.read(name))
                continue
            weight, keep = sparse.turned(owner, source.read(name)).contiguous(), sparse.masks[owner]
            if lost := int(((weight != 0) & ~keep).count_nonzero()):
                raise FormatError(
                    f"{source.folder}: {name} holds {lost} weights that are not zero where its mask prunes; "
                    f"set them to zero, or remove {MASKS_NAME}"
                )
            for part, tensor in chosen.pack(owner, weight, keep):
                writer.write(part, tensor if variant else sparse.turned(owner, tensor))
        writer.finish()
    finally:
        writer.close()


def _write_side_files(source: Checkpoint, work: Path, facts: Facts) -> None:
    source.copy_side_files(work)
    stamp_config(work, facts.format, facts.version, facts.variant)


def _compare(source: Checkpoint, written: Checkpoint, sparse: _Sparse, progress: Track) -> None:
    """Raise FormatError unless ``written``, read from its files, stands for the source's very bytes."""
    expected = source.specs
    if differing := expected.keys() ^ written.specs.keys():
        raise FormatError(f"{written.folder}: after writing, {min(differing)} is in one of source and export only")
    for name in progress(expected, len(expected), "comparing"):
        before, after = raw(source.read(name)), raw(written.read(name))
        owner = _sparse_owner(name, sparse)
        if owner is not None:
            keep = sparse.masks[owner]
            sparse.turned(owner, before).masked_fill_(~keep, 0)  # -0.0 at a pruned place is written as +0.0
            stored = written.mask(owner)
            if stored is None or not torch.equal(stored, keep):
                raise FormatError(f"{written.folder}: the mask of {owner} reads back differently; is the disk sound?")
        if not _same_bytes(before, after):
            raise FormatError(f"{written.folder}: {name} reads back differently from the source; is the disk sound?")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _sparse_owner(name: str, sparse: _Sparse) -> str | None:
    owner = name.removesuffix(".weight")
    return owner if owner != name and owner in sparse.patterns else None
