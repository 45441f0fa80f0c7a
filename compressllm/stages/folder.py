"""The run folder: the resolved recipe, the manifest, one folder a stage, and the resulting model."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from compressllm.core.errors import CompressError, OutOfMemoryError, RunError, TrainingError
from compressllm.core.run import JOURNAL, write_atomically, write_json
from compressllm.core.settings import differences
from compressllm.stages.environment import environment
from compressllm.stages.recipe import Recipe
from compressllm.stages.yamltext import parse_yaml

MANIFEST, RECIPE, MODEL = "manifest.json", "recipe.yaml", "model"


class RunFolder:
    """A run folder, locked while it is open.

    If the run fails on its input before any stage is finished, a folder that this object made is removed again;
    whatever else happens, finished work and the checkpoints of a training that diverged stay.

    Args:
        path: New or empty folder, or one that an interrupted run of the same recipe left.
        resume: Whether such a folder is taken up; if not, it is refused.
        source: Name of the folder the weights are read from; of a hub snapshot, its revision.

    Raises: RunError if the folder holds something else, a run of another recipe, or is in use; or cannot be made.
    """

    def __init__(self, path: Path, recipe: Recipe, resume: bool, source: str) -> None:
        self.path = path
        self.made = not path.exists()
        held = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file; give a new folder")
        if held and MANIFEST not in held:
            raise RunError(f"{path}: holds {held[0]} and is not a run folder; give a new or empty folder")
        if held and not resume:
            raise RunError(f"{path}: holds a run already; give a new folder, or --resume to go on with it")
        self._lock = _take_lock(path)
        try:
            self.manifest = self._take_up(recipe) if held else self._begin(recipe, source)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        kept = isinstance(error, TrainingError | OutOfMemoryError) and any(self.path.glob(f"*/{JOURNAL}"))
        if self.made and isinstance(error, CompressError) and not self.manifest["stages"] and not kept:
            shutil.rmtree(self.path)
        else:
            (self.path / ".lock").unlink(missing_ok=True)

    def stage_done(self, index: int) -> dict[str, Any] | None:
        """The manifest's entry of stage ``index``, or None if it is not finished."""
        stages: list[dict[str, Any]] = self.manifest["stages"]
        return stages[index] if index < len(stages) else None

    def stage_folder(self, index: int, name: str) -> Path:
        """The folder of unfinished stage ``index``: with what it can go on from, or else empty."""
        folder = self._stage_path(index, name)
        if folder.exists() and not (folder / JOURNAL).exists():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        return folder

    def finish_stage(self, entry: dict[str, Any]) -> None:
        """Add a finished stage to the manifest."""
        self.manifest["stages"].append(entry)
        write_json(self.path / MANIFEST, self.manifest)
        (self._stage_path(len(self.manifest["stages"]) - 1, entry["stage"]) / JOURNAL).unlink(missing_ok=True)

    def finish(self) -> None:
        """Move the last stage's model to ``model`` and close the manifest."""
        last = next((s for s in reversed(self.manifest["stages"]) if s["model"]), None)
        if last and last["model"] != MODEL:
            if not (self.path / MODEL).exists():
                (self.path / last["model"]).replace(self.path / MODEL)
            last["model"] = MODEL
        self.manifest["finished"] = now()
        write_json(self.path / MANIFEST, self.manifest)

    def model_of(self, entry: dict[str, Any]) -> Path:
        """The model folder a finished stage left, wherever it has been moved since."""
        folder = self.path / str(entry["model"])
        return folder if folder.exists() else self.path / MODEL

    def _stage_path(self, index: int, name: str) -> Path:
        return self.path / f"{index + 1:02d}-{name}"

    def _begin(self, recipe: Recipe, source: str) -> dict[str, Any]:
        manifest = {
            "schema": 1,
            "model": recipe.model,
            "source": source,
            "seed": recipe.seed,
            "begun": now(),
            "finished": None,
            "environment": environment(),
            "stages": [],
        }
        write_atomically(self.path / RECIPE, recipe.to_yaml())
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def _take_up(self, recipe: Recipe) -> dict[str, Any]:
        try:
            before = (self.path / RECIPE).read_text()
            manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
            if not isinstance(manifest["stages"], list):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{self.path}: holds a damaged run; remove it or give a new folder") from None
        if before != recipe.to_yaml():
            raise RunError(
                f"{self.path}: holds a run of another recipe ({_differences(before, recipe)}); "
                "give a new folder, or the same recipe again"
            )
        return manifest


def _differences(before: str, recipe: Recipe) -> str:
    """All settings that differ between a run's recipe, as YAML, and another."""
    return "; ".join(differences(parse_yaml(before, RECIPE)[0], recipe.model_dump(mode="json"))) or "of another version"


@contextlib.contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, against another process.

    Raises: RunError if it is in use or cannot be written.
    """
    lock = _take_lock(path)
    try:
        yield
    finally:
        os.close(lock)
        (path / ".lock").unlink(missing_ok=True)


def _take_lock(path: Path) -> int:
    """Descriptor of the folder's lock; the folder is made. Raises RunError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it if the process dies
    except OSError:
        os.close(lock)
        raise RunError(f"{path}: is in use by another run; wait for it or give another folder") from None
    return lock


def now() -> str:
    """The time, as the manifest has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
