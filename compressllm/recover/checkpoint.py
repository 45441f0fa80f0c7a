"""Checkpoints of a training: everything that its next step depends on, in files of the same content on any machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressllm.core.atomic import put_in_place, write_json
from compressllm.core.errors import FormatError, RunError
from compressllm.core.masks import pack_bits, unpack_bits
from compressllm.core.run import JOURNAL, read_journal
from compressllm.core.settings import differences
from compressllm.models.tensorfile import TensorFile, TensorFileWriter, TensorSpec
from compressllm.recover.masking import Masking
from compressllm.recover.optimizer import Optimizer
from compressllm.recover.sharding import Sharding

_PARTS = ("weight", "first", "second")


class Checkpoints:
    """Saves a training into a folder, and takes one up that was interrupted.

    ``progress.json`` names the last whole checkpoint and the best one; it is replaced in one step, after what it
    names has been synced. Tensors are whole in the files, whatever they were sharded to, so that another number of
    processes can go on from them; one is gathered at a time.

    The order of windows and the schedules are functions of the step, and nothing in training is left to chance, so
    there is no other state to keep.

    Args:
        folder: Existing folder; None keeps only the best weights, in memory.
        fingerprint: Everything that the result depends on; a checkpoint with another one is refused.
        shapes: Trained parameter -> whole shape.
    """

    def __init__(
        self,
        folder: Path | None,
        fingerprint: Mapping[str, Any],
        shapes: Mapping[str, torch.Size],
        optimizer: Optimizer,
        masking: Masking,
        sharding: Sharding,
    ) -> None:
        self._folder, self._shapes = folder, dict(shapes)
        self._optimizer, self._masking, self._sharding = optimizer, masking, sharding
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self.facts: dict[str, Any] = {}
        """What was said beside the last checkpoint: counters and measurements, as plain data."""
        self._in_memory: dict[str, Tensor] = {}

    @property
    def _writes(self) -> bool:
        return self._folder is not None and self._sharding.ranks.rank == 0

    def resume_(self) -> int:
        """Put the last checkpoint's state into optimizer and masks; returns the step it was made after, 0 for none.

        Raises: RunError for another fingerprint, naming all that differs; FormatError for a damaged checkpoint.
        """
        progress = self._sharding.ranks.exchange(self._read_journal())[0]
        if progress is None or self._folder is None:
            return 0
        if changed := differences(progress["fingerprint"], self._fingerprint):
            raise RunError(
                f"{self._folder}: was begun with other settings: {'; '.join(changed)}; "
                "restore them, or start again in a new folder"
            )
        if "checkpoint" not in progress:
            return 0
        self.facts, step = dict(progress["facts"]), int(progress["step"])
        self._load_(self._folder / progress["checkpoint"], step)
        return step

    def begin(self) -> None:
        """Note the fingerprint, before the first checkpoint is there."""
        if self._writes and self._folder:
            write_json(self._folder / JOURNAL, {"fingerprint": self._fingerprint})

    def save(self, step: int, facts: Mapping[str, Any]) -> None:
        """Keep the state after ``step``; the one kept before goes."""
        name = f"checkpoint-{step:07d}"
        self._write(name, dict(self._state()))
        self.facts = dict(facts)
        if self._writes and self._folder:
            progress = {"fingerprint": self._fingerprint, "step": step, "checkpoint": name, "facts": self.facts}
            write_json(self._folder / JOURNAL, progress)
            for old in self._folder.glob("checkpoint-*"):
                if old.name != name:
                    shutil.rmtree(old)
            self._drop_best_but(self._named_best())

    def save_best(self, step: int) -> str:
        """Keep the weights after ``step`` as they are used, and their masks; the name is for `load_best_`."""
        name = f"best-{step:07d}"
        state = {f"{key}.weight": (self._optimizer.result(key), self._shapes[key]) for key in self._shapes}
        state |= dict(self._masks())
        if self._folder is None:
            self._in_memory = {key: local.clone() for key, (local, _) in state.items()}
            return name
        self._write(name, state)
        self._drop_best_but(name, self._named_best())
        return name

    def load_best_(self, name: str) -> None:
        """Put weights that `save_best` kept, and their masks, into the optimizer; moments are left."""
        if self._folder is None:
            for key in self._shapes:
                self._optimizer.weights[key].copy_(self._in_memory[f"{key}.weight"])
            for key, one in self._masking.weights.items() if self._masking.moves else ():
                one.keep = self._in_memory[f"{key}.keep"]
        else:
            file = TensorFile(self._folder / name / "state.safetensors")
            for key in self._shapes:
                self._optimizer.weights[key].copy_(self._sharding.rows(file.read(f"{key}.weight")))
            self._load_masks_(file)
        self._optimizer.write_()

    def clean(self) -> None:
        """Remove all checkpoints: the result is recorded, and nobody will go on from them."""
        if self._writes and self._folder:
            for old in (*self._folder.glob("checkpoint-*"), *self._folder.glob("best-*")):
                shutil.rmtree(old)

    def _named_best(self) -> str | None:
        """The best weights that the last checkpoint goes on with."""
        name: str | None = self.facts.get("best", {}).get("name")
        return name

    def _drop_best_but(self, *names: str | None) -> None:
        if self._writes and self._folder:
            for old in self._folder.glob("best-*"):
                if old.name not in names:
                    shutil.rmtree(old)

    def _state(self) -> Iterable[tuple[str, tuple[Tensor, torch.Size]]]:
        of = (self._optimizer.weights, self._optimizer.first, self._optimizer.second)
        for key, shape in self._shapes.items():
            for part, tensors in zip(_PARTS, of, strict=True):
                yield f"{key}.{part}", (tensors[key], shape)
        yield from self._masks()

    def _masks(self) -> Iterable[tuple[str, tuple[Tensor, torch.Size]]]:
        if self._masking.moves:
            for key, one in self._masking.weights.items():
                yield f"{key}.keep", (one.keep, self._shapes[key])

    def _write(self, name: str, state: Mapping[str, tuple[Tensor, torch.Size]]) -> None:
        """Write a folder under a name that it has only once it is whole; all processes hand over their rows."""
        writer, partial, final = None, None, None
        if self._writes and self._folder:
            partial, final = self._folder / f"{name}.partial", self._folder / name
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            writer = TensorFileWriter(
                partial / "state.safetensors", {key: _spec(*value) for key, value in state.items()}
            )
        for key, (local, shape) in state.items():
            whole = self._sharding.whole(local, shape)
            if writer:
                writer.write(key, (pack_bits(whole) if whole.dtype == torch.bool else whole).cpu().contiguous())
        if writer and partial and final:
            writer.close()
            shutil.rmtree(final, ignore_errors=True)
            put_in_place(partial, final)

    def _load_(self, folder: Path, step: int) -> None:
        file = TensorFile(folder / "state.safetensors")
        moved = False
        of = (self._optimizer.weights, self._optimizer.first, self._optimizer.second)
        for key, shape in self._shapes.items():
            for part, tensors in zip(_PARTS, of, strict=True):
                if file.specs.get(f"{key}.{part}", TensorSpec(torch.float32, ())).shape != tuple(shape):
                    raise FormatError(f"{file.path}: lacks {key}.{part} of shape {tuple(shape)}; start again")
                whole = file.read(f"{key}.{part}")
                moved = moved or (part == "second" and bool(whole.any()))
                tensors[key].copy_(self._sharding.rows(whole))
        if step and not moved:
            raise FormatError(f"{file.path}: all second moments are zero, so no optimizer wrote it; start again")
        self._load_masks_(file)
        self._optimizer.resume_(step)

    def _load_masks_(self, file: TensorFile) -> None:
        for key, one in self._masking.weights.items() if self._masking.moves else ():
            whole = unpack_bits(file.read(f"{key}.keep"), self._shapes[key][-1])
            one.keep = self._sharding.rows(whole).to(one.keep.device)

    def _read_journal(self) -> dict[str, Any] | None:
        if not self._writes or self._folder is None or not (self._folder / JOURNAL).exists():
            return None
        progress = read_journal(self._folder / JOURNAL, {"fingerprint"})
        for scrap in self._folder.glob("*.partial"):
            shutil.rmtree(scrap)
        return progress


def _spec(local: Tensor, shape: torch.Size) -> TensorSpec:
    if local.dtype != torch.bool:
        return TensorSpec(local.dtype, tuple(shape))
    return TensorSpec(torch.uint8, (shape[0], -(-shape[-1] // 8)))
