"""What a run left in its folder, read back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressllm.core.errors import RunError

# stages/folder.py and stages/sweep.py give these names too, but import torch.
_MANIFEST, _RECIPE, _SWEEP, _TRAINING = "manifest.json", "recipe.yaml", "sweep.json", "metrics.jsonl"


@dataclass(frozen=True)
class RunRecord:
    """A run or a sweep.

    Args:
        name: The folder's.
        manifest: Of the run; of a sweep alone, what it shares with one.
        recipe: YAML text, or None.
        training: Number of a recover stage, from 0 -> the lines it wrote while it ran.
        sweep: What ``sweep.json`` holds, or None.
        benches: File name -> what ``compressllm bench --json`` printed into it.
        selections: File name -> the report of chosen training records.
    """

    name: str
    manifest: dict[str, Any]
    recipe: str | None
    training: dict[int, list[dict[str, Any]]]
    sweep: dict[str, Any] | None
    benches: dict[str, dict[str, Any]]
    selections: dict[str, dict[str, Any]]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The finished stages, in order."""
        return list(self.manifest["stages"])


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, or a sweep's.

    JSON files that were put into it, of ``bench --json`` and of ``select``, are known by what is in them; so are
    those that a stage left in its own folder.

    Raises: RunError if it is neither, or damaged.
    """
    sweep = _json(folder / _SWEEP) if (folder / _SWEEP).exists() else None
    if (folder / _MANIFEST).exists():
        manifest = _json(folder / _MANIFEST)
        if not isinstance(manifest.get("stages"), list):
            raise RunError(f"{folder / _MANIFEST}: is not a run's manifest; it has no stages")
    elif sweep is not None:
        manifest = {**sweep, "model": sweep.get("sweep", {}).get("model", ""), "stages": []}
    else:
        raise RunError(f"{folder}: is no run folder: it has no {_MANIFEST}; give what `compressllm run` wrote to")
    others = {str(path.relative_to(folder)): found for path, found in _other_files(folder)}
    recipe = folder / _RECIPE
    return RunRecord(
        name=folder.resolve().name,
        manifest=manifest,
        recipe=recipe.read_text() if recipe.exists() else None,
        training=dict(_training(folder, manifest["stages"])),
        sweep=sweep,
        benches={name: found for name, found in others.items() if _has_rows(found, "rows")},
        selections={name: found for name, found in others.items() if _has_rows(found, "clusters")},
    )


def _other_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted([*folder.glob("*.json"), *folder.glob("[0-9][0-9]-*/*.report.json")]):
        if path.name not in {_MANIFEST, _SWEEP}:
            with contextlib.suppress(RunError):  # it may be anybody's
                yield path, _json(path)


def _has_rows(found: dict[str, Any], key: str) -> bool:
    rows = found.get(key)
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _training(folder: Path, stages: list[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for index, stage in enumerate(stages):
        path = folder / f"{index + 1:02d}-{stage['stage']}" / _TRAINING
        if path.exists():
            yield index, [row for row in map(_row, path.read_text().splitlines()) if row]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # cut short by a kill
        return None
    return row if isinstance(row, dict) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path}: holds no JSON object; is it a result of compressllm?")
    return found
