"""The run folder: the resolved recipe, the manifest, one folder a stage, and the resulting model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from compressllm.core.atomic import drop_scratch, is_scratch, sync, write_atomically, write_json
from compressllm.core.errors import CompressError, OutOfMemoryError, RunError, TrainingError
from compressllm.core.lock import Lock
from compressllm.core.run import JOURNAL, TEACHER
from compressllm.core.settings import differences
from compressllm.stages.environment import environment
from compressllm.stages.recipe import Recipe
from compressllm.stages.yamltext import parse_yaml

MANIFEST, RECIPE, MODEL = "manifest.json", "recipe.yaml", "model"
LOCK = ".lock"


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
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file; give a new folder")
        self._lock = lock_folder(path)
        self._deferred: list[Callable[[], None]] = []
        try:
            held = sorted(one.name for one in path.iterdir() if one.name != LOCK and not is_scratch(one))
            if held and MANIFEST not in held:
                raise RunError(f"{path}: holds {held[0]} and is not a run folder; give a new or empty folder")
            if held and not resume:
                raise RunError(f"{path}: holds a run already; give a new folder, or --resume to go on with it")
            drop_scratch(path)
            self.manifest = self._take_up(recipe, source) if held else self._begin(recipe, source)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = isinstance(error, TrainingError | OutOfMemoryError) and any(self.path.rglob(JOURNAL))
        if self.made and isinstance(error, CompressError) and not self.manifest["stages"] and not kept:
            shutil.rmtree(self.path)
        self._lock.release()

    def stage_done(self, index: int) -> dict[str, Any] | None:
        """The manifest's entry of stage ``index``, or None if it is not finished."""
        stages: list[dict[str, Any]] = self.manifest["stages"]
        return stages[index] if index < len(stages) else None

    def stage_folder(self, index: int, name: str) -> Path:
        """The folder of unfinished stage ``index``: with what it can go on from, or else empty."""
        folder = self.stage_path(index, name)
        if folder.exists() and not any(folder.rglob(JOURNAL)):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        drop_scratch(folder)
        return folder

    def defer(self, work: Callable[[], None]) -> None:
        """Have this done once the manifest has the stage that is running."""
        self._deferred.append(work)

    def finish_stage(self, entry: dict[str, Any]) -> None:
        """Add a finished stage to the manifest."""
        self.manifest["stages"].append(entry)
        write_json(self.path / MANIFEST, self.manifest)
        self._drop_journal(len(self.manifest["stages"]) - 1)
        for work in self._deferred:
            work()
        self._deferred.clear()

    def finish(self, complete: Callable[[Path, dict[str, Any]], None]) -> None:
        """Move the last stage's model to ``model``, let ``complete`` add what the manifest tells, and close that."""
        last = next((s for s in reversed(self.manifest["stages"]) if s["model"]), None)
        if last and last["model"] != MODEL:
            if not (self.path / MODEL).exists():
                (self.path / last["model"]).replace(self.path / MODEL)
                sync(self.path)
            last["model"] = MODEL
        drop_scratch(self.path / MODEL)
        complete(self.path / MODEL, self.manifest)
        self.manifest["finished"] = now()
        write_json(self.path / MANIFEST, self.manifest)

    def model_of(self, entry: dict[str, Any]) -> Path:
        """The model folder a finished stage left, wherever it has been moved since."""
        folder = self.path / str(entry["model"])
        return folder if folder.exists() else self.path / MODEL

    def stage_path(self, index: int, name: str) -> Path:
        """The folder of stage ``index``, there or not."""
        return self.path / f"{index + 1:02d}-{name}"

    def _drop_journal(self, index: int) -> None:
        """A finished stage's journal and checkpoints go; also those that a kill just after it was finished left."""
        folder = self.stage_path(index, self.manifest["stages"][index]["stage"])
        (folder / JOURNAL).unlink(missing_ok=True)
        for scrap in (*folder.glob("checkpoint-*"), *folder.glob("best-*"), *folder.glob(TEACHER)):
            shutil.rmtree(scrap)

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
        write_json(self.path / MANIFEST, manifest)  # first: it makes this a run folder
        write_atomically(self.path / RECIPE, recipe.to_yaml())
        return manifest

    def _take_up(self, recipe: Recipe, source: str) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
            if not isinstance(manifest["stages"], list):
                raise ValueError
            if not manifest["stages"] and not (self.path / RECIPE).exists():
                return self._begin(recipe, source)  # killed between the two
            before = (self.path / RECIPE).read_text()
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{self.path}: holds a damaged run; remove it or give a new folder") from None
        if before != recipe.to_yaml():
            raise RunError(
                f"{self.path}: holds a run of another recipe ({_differences(before, recipe)}); "
                "give a new folder, or the same recipe again"
            )
        self.manifest = manifest
        for index in range(len(manifest["stages"])):
            self._drop_journal(index)
        return manifest


def _differences(before: str, recipe: Recipe) -> str:
    """All settings that differ between a run's recipe, as YAML, and another."""
    then, now = (parse_yaml(text, RECIPE)[0] for text in (before, recipe.to_yaml()))
    return "; ".join(differences(then, now)) or "of another version"


def lock_folder(path: Path) -> Lock:
    """Hold a folder, made if it is not there, against other processes.

    Raises: RunError, naming the process, if it is in use; or if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return Lock(path / LOCK, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def now() -> str:
    """The time, as the manifest has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
