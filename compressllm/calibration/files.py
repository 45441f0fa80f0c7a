"""Documents in local files: plain text, JSON lines or parquet, each with or without gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compressllm.core.errors import CalibrationError, RecipeError
from compressllm.core.protocols import SOURCES, Split
from compressllm.core.tablefile import read_table
from compressllm.core.textfile import open_text_file

_PLAIN, _LINES, _TABLE = (".txt", ".raw", ".md"), (".jsonl", ".json"), (".parquet",)
SUFFIXES = _PLAIN + _LINES + _TABLE


def text_suffix(path: Path) -> str:
    """The suffix that tells the format, lower case, ``.gz`` set aside: ``.raw`` of ``wiki.test.raw.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@SOURCES.register("file")
@dataclass(frozen=True)
class TextFile:
    """A local .txt, .raw, .md, .jsonl, .json or .parquet file, plain or .gz; the same text for either split.

    Texts are used to the byte. So WikiText-2's ``wiki.test.raw``, one document with single line ends, is not
    the string the papers evaluate on: that is its rows joined by two newlines, which the ``.jsonl`` and
    ``.parquet`` forms (a row a line of the raw file) give. Both are accepted; their perplexities differ.

    Args:
        path: The file. Plain text is one document; JSON has one object a line.
        field: Name of the text in a JSON object, or of the parquet column.
    """

    path: Path
    field: str = "text"

    def __post_init__(self) -> None:
        if text_suffix(self.path) not in SUFFIXES:
            raise RecipeError(f"{self.path}: not a kind of text file; known: {', '.join(SUFFIXES)}, each also with .gz")

    def texts(self, split: Split) -> Iterator[str]:
        """The documents in file order, blank ones included.

        Raises: CalibrationError with file and line if the file cannot be read, or has no text at all.
        """
        blank = True
        try:
            with open_text_file(self.path.expanduser()) as file:
                for text in self._read(file):
                    blank = blank and not text.strip()
                    yield text
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise CalibrationError(f"{self.path}: is not a whole gzip file; fetch it again") from None
        except OSError as error:
            raise CalibrationError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if blank:
            raise CalibrationError(f"{self.path}: holds no text")

    def _read(self, file: IO[bytes]) -> Iterator[str]:
        suffix = text_suffix(self.path)
        if suffix in _PLAIN:
            return self._whole(file)
        return self._lines(file) if suffix in _LINES else self._column(file)

    def _whole(self, file: IO[bytes]) -> Iterator[str]:
        data = file.read()
        try:
            yield data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise CalibrationError(f"{self.path}:{line}: is not UTF-8 text; convert it") from None

    def _lines(self, file: IO[bytes]) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{self.path}:{number}"
            try:
                text = self._field(json.loads(line), where)
                text.encode()  # JSON can spell half a surrogate pair, which is no text
            except UnicodeError:
                raise CalibrationError(f"{where}: is not UTF-8 text; convert it") from None
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where}: is not JSON ({error}); give one object a line") from None
            yield text

    def _field(self, row: Any, where: str) -> str:
        if not isinstance(row, dict):
            raise CalibrationError(f"{where}: is a JSON {type(row).__name__}; give one object a line")
        if self.field not in row:
            raise CalibrationError(self._lacks_field(where, [str(key) for key in row]))
        return self._text(row[self.field], where)

    def _column(self, file: IO[bytes]) -> Iterator[str]:
        columns, rows = read_table(file, self.path.expanduser(), (self.field,))
        if self.field not in columns:
            raise CalibrationError(self._lacks_field(str(self.path), columns))
        for number, row in enumerate(rows, 1):
            yield self._text(row[self.field], f"{self.path}: row {number}")

    def _lacks_field(self, where: str, names: list[str]) -> str:
        return (
            f"{where}: has no field {self.field!r}, only {', '.join(names) or 'none'}; "
            f"name another as {{file: {{path: {self.path}, field: NAME}}}}"
        )

    def _text(self, value: object, where: str) -> str:
        if not isinstance(value, str):
            raise CalibrationError(f"{where}: field {self.field!r} is of type {type(value).__name__}, not a string")
        return value
