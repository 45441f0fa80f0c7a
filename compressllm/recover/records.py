"""Prompt and response records from JSON lines; what cannot be used is counted, with the first place of each kind."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from compressllm.core.config import Config
from compressllm.core.errors import CalibrationError
from compressllm.core.textfile import open_text_file

#: One turn of a conversation, as chat templates take it.
Message = dict[str, str]


class RecordConfig(Config):
    """How records are read and laid out."""

    prompt: str = "instruction"
    """Field that holds what the model is asked."""
    context: str = "input"
    """Field that holds what the question is about; it may be missing or empty."""
    response: str = "output"
    """Field that holds the answer, which alone is trained on."""
    messages: str = "messages"
    """Field of records that are conversations: a list of {role, content}, whose assistant turns are trained on."""
    over_length: Literal["drop", "truncate"] = "drop"
    """What to do with records longer than a row: leave them out, or cut their end off. Both are counted."""
    packing: bool = True
    """Several records in one row, none of which sees the others; else one a row, padded to the longest of its batch."""


@dataclass
class Tally:
    """How many records were used, and how many not, by reason.

    Args:
        used: Records that became rows.
        unused: Reason -> how many, and where the first of them stands.
    """

    used: int = 0
    unused: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, reason: str, where: str) -> None:
        """Count one record that is not used."""
        count, first = self.unused.get(reason, (0, where))
        self.unused[reason] = (count + 1, first)

    def facts(self) -> dict[str, Any]:
        """All of it as plain data."""
        unused = {reason: {"records": count, "first": first} for reason, (count, first) in self.unused.items()}
        return {"used": self.used, "unused": unused}

    def __str__(self) -> str:
        return "; ".join(f"{count} {reason} (first: {first})" for reason, (count, first) in self.unused.items())


def read_records(path: Path, config: RecordConfig, tally: Tally) -> Iterator[tuple[str, list[Message]]]:
    """Where each usable record stands, and its conversation, which ends with the assistant's turn.

    Args:
        path: JSON lines, plain or .gz.
        tally: Counts what is left out: lines that are not UTF-8 or not a JSON object, fields that are missing, empty
            or not text.

    Raises: CalibrationError if the file cannot be read.
    """
    try:
        with open_text_file(path.expanduser()) as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                record = _parsed(line)
                messages = _conversation(record, config) if isinstance(record, dict) else record
                if isinstance(messages, str):
                    tally.leave_out(messages, where)
                else:
                    yield where, messages
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise CalibrationError(f"{path}: is not a whole gzip file; fetch it again") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parsed(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or why there is none."""
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()  # JSON can spell half a surrogate pair, which is no text
    except UnicodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    return record if isinstance(record, dict) else "not a JSON object"


def _conversation(record: dict[str, Any], config: RecordConfig) -> list[Message] | str:
    """The turns of a record up to the assistant's last, or why it has none."""
    if config.messages in record:
        return _turns(record[config.messages], config.messages)
    prompt, response, context = (record.get(name) for name in (config.prompt, config.response, config.context))
    for name, value in ((config.prompt, prompt), (config.response, response)):
        if value is None:
            return f"without field {name!r}"
        if not isinstance(value, str):
            return f"with a field {name!r} that is no text"
        if not value.strip():
            return f"with an empty field {name!r}"
    if context is not None and not isinstance(context, str):
        return f"with a field {config.context!r} that is no text"
    asked = f"{prompt}\n\n{context}" if context and context.strip() else cast(str, prompt)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": cast(str, response)}]


def _turns(messages: Any, name: str) -> list[Message] | str:
    if not isinstance(messages, list):
        return f"with a field {name!r} that is no list"
    turns: list[Message] = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return f"with a turn in {name!r} that lacks a role or content"
        turns.append({"role": role, "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        return f"without an assistant's turn in {name!r}"
    return turns
