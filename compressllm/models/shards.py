"""The tensors of a checkpoint folder, across its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compressllm.core.errors import FormatError
from compressllm.models.sidefiles import inside, read_json
from compressllm.models.tensorfile import Layout, TensorFile, TensorFileWriter, TensorSpec

MAX_SHARD_BYTES = 5_000_000_000  # what the Hugging Face libraries write by default, decimal


def _stem(variant: str | None) -> str:
    return f"model.{variant}" if variant else "model"


def index_name(variant: str | None = None) -> str:
    """File name of the shard index, as transformers looks for it."""
    return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"


class ShardReader:
    """Reads named tensors from a folder's ``model*.safetensors``, one shard or many.

    Args:
        folder: A checkpoint folder.
        variant: The variant in the shards' names, or None for a plain checkpoint.

    Raises: FormatError if files are missing, damaged, or the index and the shards disagree.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        self.files: dict[str, TensorFile] = {}
        self._file_of: dict[str, TensorFile] = {}
        for file_name, expected in _shards(folder, variant).items():
            file = TensorFile(inside(folder, file_name))
            self.files[file_name] = file
            if expected is not None and (lost := expected - file.specs.keys()):
                raise FormatError(f"{folder / file_name}: lacks tensor {min(lost)}, which the index places in it")
            self._file_of.update(dict.fromkeys(file.specs if expected is None else sorted(expected), file))

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensor name -> dtype and shape."""
        return {name: file.specs[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor. Raises FormatError if no shard holds ``name``."""
        if name not in self._file_of:
            raise FormatError(f"the checkpoint has no tensor {name}")
        return self._file_of[name].read(name)


class ShardWriter:
    """Writes named tensors into shards of bounded size whose layout is fixed at the start.

    Tensors may come in any order, and what an interrupted writer with the same layout wrote is kept.

    Args:
        folder: Existing folder that receives the shards.
        layout: Every tensor to come, with dtype and shape.
        variant: Put into the shards' names; stock loaders then refuse the folder unless told the same.
        begun: Whether the shards must be there, since work that is finished is in them.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        variant: str | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        begun: bool = False,
    ) -> None:
        self.folder, self.variant = folder, variant
        self._layout = layout
        parts = _split(layout, max_shard_bytes)
        self._writers: dict[str, TensorFileWriter] = {}
        self._writer_of: dict[str, TensorFileWriter] = {}
        for number, part in enumerate(parts, 1):
            suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
            file_name = f"{_stem(variant)}{suffix}.safetensors"
            writer = TensorFileWriter(folder / file_name, part, begun=begun)
            self._writers[file_name] = writer
            self._writer_of.update(dict.fromkeys(part, writer))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor in its place."""
        self._writer_of[name].write(name, tensor)

    def read(self, name: str) -> Tensor:
        """Read back a tensor written before."""
        return self._writer_of[name].read(name)

    def sync(self) -> None:
        """Make what was written so far survive a power cut."""
        for writer in self._writers.values():
            writer.sync()

    def finish(self) -> None:
        """Close the shards and write their index, if there is more than one."""
        for writer in self._writers.values():
            writer.close()
        if len(self._writers) > 1:
            place = {name: writer.path.name for name, writer in sorted(self._writer_of.items())}
            total = sum(spec.bytes for spec in self._layout.values())
            index = {"metadata": {"total_size": total}, "weight_map": place}
            (self.folder / index_name(self.variant)).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        """Close the shards and leave them as they are, for a later writer to take up."""
        for writer in self._writers.values():
            writer.close()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(folder: Path, variant: str | None) -> Mapping[str, set[str] | None]:
    """Shard file name -> tensors the index places in it, or None where there is no index."""
    index, single = folder / index_name(variant), f"{_stem(variant)}.safetensors"
    if not index.exists():
        if (folder / single).exists():
            return {single: None}
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = f"; it holds {pickled[0]}, and pickled weights are not read: convert them" if pickled else ""
        raise FormatError(f"{folder}: holds no {single} and no {index.name}{hint}")
    described = read_json(index)
    try:
        weight_map = described["weight_map"]
        shards: dict[str, set[str] | None] = {}
        for name, file_name in weight_map.items():
            if Path(file_name).name != file_name:
                raise FormatError(f"{index}: names a shard outside its folder: {file_name}")
            tensors = shards.setdefault(file_name, set())
            if tensors is not None:
                tensors.add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index}: is not a shard index ({error!r}); fetch it again") from None
    for file_name in shards:
        if not (folder / file_name).exists():
            raise FormatError(f"{folder / file_name}: is missing, though the index names it; fetch it again")
    return shards


def _split(layout: Layout, max_bytes: int) -> list[dict[str, TensorSpec]]:
    parts: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in layout.items():
        if size and size + spec.bytes > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.bytes
    return parts
