"""Prompt and response records, and reading them from a file that may hold bad ones."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from compressllm.core.errors import CalibrationError
from compressllm.core.tablefile import read_table
from compressllm.core.textfile import open_text_file

#: What a prompt and a response may be called, in the order they are looked for.
PROMPTS: Final = ("instruction", "prompt", "question")
RESPONSES: Final = ("output", "response", "completion", "answer")

# Past this many characters a record is not read as text any more: it is a mistake, not an example.
_ENORMOUS: Final = 1_000_000
# Line numbers that the report gives as examples of one fault.
_EXAMPLES: Final = 5


@dataclass(frozen=True)
class Record:
    """One example of a task.

    Args:
        turns: ``(role, text)`` of all before the response, a user's turn last.
        response: What is to be answered.
        row: The record as it was in the file.
        line: Its place there, from 1: a line, or a row.
    """

    turns: tuple[tuple[str, str], ...]
    response: str
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    line: int = field(default=0, compare=False)

    @property
    def prompt(self) -> str:
        """The text of all turns."""
        return "\n".join(text for _, text in self.turns)


@dataclass
class Faults:
    """Records that cannot be used.

    Args:
        counts: Reason -> how many.
        lines: Reason -> where the first few of them are.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        """Count one."""
        self.counts[reason] += 1
        if len(lines := self.lines.setdefault(reason, [])) < _EXAMPLES:
            lines.append(line)

    def as_json(self) -> dict[str, Any]:
        """Reason -> count and first lines."""
        return {reason: {"records": n, "first_lines": self.lines[reason]} for reason, n in self.counts.items()}

    def __str__(self) -> str:
        return ", ".join(f"{n} {reason} (first: {self.lines[reason][0]})" for reason, n in self.counts.items())


def read_records(path: Path) -> tuple[list[Record], Faults]:
    """All usable records of a ``.jsonl``, ``.json`` (one list, or an object a line) or ``.parquet`` file, plain or .gz.

    A record has ``instruction`` (and perhaps ``input``), ``prompt`` or ``question``, and ``output``, ``response``,
    ``completion`` or ``answer``; or ``messages`` of ``role`` and ``content``, the last assistant's one its response.
    Empty, unreadable, enormous and repeated ones are counted, not raised.

    Raises: CalibrationError if the file cannot be read, or not one record of it is usable.
    """
    records: list[Record] = []
    faults = Faults()
    seen: set[tuple[object, str]] = set()
    for line, row in _rows(path):
        record = row if isinstance(row, str) else parse_record(row, line)
        if not isinstance(record, str):
            if (content := (record.turns, record.response)) not in seen:
                seen.add(content)
                records.append(record)
                continue
            record = "repeated"
        faults.add(record, line)
    if not records:
        raise CalibrationError(f"{path}: holds no usable record: {faults or 'it is empty'}")
    return records, faults


def parse_record(row: Any, line: int = 0) -> Record | str:
    """The record of a JSON object, or what is wrong with it."""
    if not isinstance(row, Mapping):
        return "not an object"
    turns, response = _messages(row["messages"]) if "messages" in row else _fields(row)
    if turns is None or response is None:
        return "without a prompt or a response"
    if not isinstance(response, str) or not all(isinstance(text, str) for turn in turns for text in turn):
        return "with a prompt or a response that is not a string"
    if not response.strip() or not any(text.strip() for _, text in turns):
        return "with an empty prompt or response"
    if len(response) + sum(len(text) for _, text in turns) > _ENORMOUS:
        return f"over {_ENORMOUS:,} characters"
    try:
        (response + "".join(text for _, text in turns)).encode()
    except UnicodeError:  # JSON can spell half a surrogate pair, which is no text
        return "not UTF-8"
    return Record(tuple((role, text.strip()) for role, text in turns), response.strip(), row, line)


def _fields(row: Mapping[str, Any]) -> tuple[Sequence[tuple[str, Any]] | None, Any]:
    prompt = next((row[name] for name in PROMPTS if row.get(name) is not None), None)
    response = next((row[name] for name in RESPONSES if row.get(name) is not None), None)
    more = row.get("input")
    if isinstance(prompt, str) and isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n\n{more}"
    return (None if prompt is None else [("user", prompt)]), response


def _messages(messages: Any) -> tuple[Sequence[tuple[Any, Any]] | None, Any]:
    if not isinstance(messages, Sequence) or not all(isinstance(one, Mapping) for one in messages):
        return None, None
    turns = [(one.get("role"), one.get("content")) for one in messages]
    last = max((at for at, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    return (turns[:last], turns[last][1]) if last else (None, None)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Place and JSON value of every row, or what is wrong with it as a string. Raises CalibrationError."""
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".jsonl", ".json", ".parquet")):
        raise CalibrationError(f"{path}: not a kind of record file; known: .jsonl, .json, .parquet, each also with .gz")
    try:
        with open_text_file(path.expanduser()) as file:
            if name.endswith(".parquet"):
                yield from enumerate(read_table(file, path.expanduser())[1], 1)
            elif name.endswith(".json") and file.peek(1)[:1] == b"[":
                yield from _list(file, path)
            else:
                yield from _lines(file)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise CalibrationError(f"{path}: is not a whole gzip file; fetch it again") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            row = "not UTF-8"
        except (ValueError, RecursionError):
            row = "not JSON"
        else:
            row = "not an object" if isinstance(row, str) else row
        yield number, row


def _list(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.load(file)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{path}: is not JSON ({error}); give one list of objects, or an object a line"
        ) from None
    yield from enumerate(("not an object" if isinstance(row, str) else row for row in rows), 1)
