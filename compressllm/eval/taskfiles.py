"""Items of evaluation tasks from local files, in the columns that lm-evaluation-harness's definitions read."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compressllm.core.errors import FormatError, RecipeError
from compressllm.core.textfile import open_text_file

Row = dict[str, Any]

_SUFFIXES: Final = (".jsonl", ".jsonl.gz")
#: Names that a task's file may have besides the task's own.
_ALSO: Final = {"social_iqa": ("social_i_qa", "siqa")}
#: What is appended to the name of a file of worked examples.
_EXAMPLES: Final = ("_dev", "_train")


@dataclass(frozen=True)
class TaskFile:
    """Where a task's items are.

    Args:
        items: JSON lines.
        examples: JSON lines of worked examples for few-shot prompts, or None.
    """

    items: Path
    examples: Path | None


def find_task_files(tasks: Sequence[str], where: Sequence[str]) -> dict[str, TaskFile]:
    """The file of each task, and beside it ``NAME_dev`` or ``NAME_train`` for worked examples.

    Args:
        where: Folders, or ``NAME=FILE``; an entry overrides those before it. Empty: no task has a file.

    Raises: RecipeError if a task has no file although files were given, or a file is named that is not there.
    """
    if not where:
        return {}
    named: dict[str, Path] = {}
    folders: list[Path] = []
    for entry in where:
        name, equals, file = entry.partition("=")
        if (folder := Path(entry).expanduser()).is_dir():
            folders.insert(0, folder)
        elif equals:
            named[name] = Path(file).expanduser()
            if not named[name].is_file():
                raise RecipeError(f"task files {entry}: there is no file {file}")
        else:
            raise RecipeError(f"task files {entry}: is no folder; give one with NAME.jsonl for each task, or NAME=FILE")
    found = {}
    for task in tasks:
        path = named.get(task) or _first(folders, (task, *_ALSO.get(task, ())))
        if path is None:
            raise RecipeError(f"{task}: none of {', '.join(where)} holds {task}.jsonl or {task}.jsonl.gz")
        stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
        found[task] = TaskFile(path, _first([path.parent], [stem + end for end in _EXAMPLES]))
    return found


def read_rows(path: Path) -> list[Row]:
    """The objects of a file of JSON lines. Raises FormatError with file and line."""
    rows = []
    try:
        with open_text_file(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise FormatError(f"{path}:{number}: is a JSON {type(row).__name__}; give one object a line")
                    rows.append(row)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise FormatError(f"{path}: is not a whole gzip file; fetch it again") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}:{len(rows) + 1}: is not JSON ({error}); give one object a line") from None
    if not rows:
        raise FormatError(f"{path}: holds no item")
    return rows


def as_published(task: str, rows: Iterable[Row]) -> list[Row]:
    """Rows with the columns that the published set has, which a task's definition reads.

    Columns that are there are kept, so rows that have them already stay as they are.
    """
    change = _COLUMNS.get(task)
    return [change(row) for row in rows] if change else list(rows)


def _boolq(row: Row) -> Row:
    return row if "label" in row or "answer" not in row else {**row, "label": int(row["answer"])}


def _hellaswag(row: Row) -> Row:
    return row if "label" in row or "gold" not in row else {**row, "label": str(row["gold"])}


def _triviaqa(row: Row) -> Row:
    answer = row.get("answer")
    if not isinstance(answer, str):
        return row
    return {**row, "answer": {"value": answer, "aliases": row.get("aliases", [answer])}}


_COLUMNS: Final[dict[str, Callable[[Row], Row]]] = {"boolq": _boolq, "hellaswag": _hellaswag, "triviaqa": _triviaqa}


def _first(folders: Iterable[Path], stems: Iterable[str]) -> Path | None:
    stems = list(stems)
    paths = (folder / f"{stem}{suffix}" for folder in folders for stem in stems for suffix in _SUFFIXES)
    return next((path for path in paths if path.is_file()), None)
