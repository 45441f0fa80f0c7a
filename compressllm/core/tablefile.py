"""Parquet files read a few rows at a time, of which no few bytes may become many."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from compressllm.core.errors import CalibrationError
from compressllm.core.textfile import most_bytes

_ROWS = 64  # at once: a dictionary of one long text may stand for millions of rows


def read_table(
    file: IO[bytes], path: Path, only: Sequence[str] | None = None
) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The names of a table's columns, and its rows as they are read.

    Args:
        file: As `open_text_file` gives it.
        path: What it is, for messages.
        only: The columns to read; None reads all. Those that the table lacks are left out.

    Raises: CalibrationError, also while rows are read, if it is no whole parquet file or grows beyond what its size
        lets expect.
    """
    # Imported here: most runs read other formats.
    from pyarrow import ArrowException, parquet

    most = most_bytes(os.stat(path).st_size)
    grown = CalibrationError(f"{path}: is a parquet file that grows to over {most} bytes, which no text does")
    damaged = f"{path}: is not a whole parquet file ({{}}); fetch it again"

    def rows() -> Iterator[dict[str, Any]]:
        left = most
        try:
            for batch in table.iter_batches(_ROWS, columns=only):
                made = batch.to_pylist()
                texts = sum(len(value) for row in made for value in row.values() if isinstance(value, str))
                left -= max(texts, batch.nbytes)  # a column that is a dictionary counts a text once
                if left < 0:
                    raise grown
                yield from made
        except (ValueError, OSError, ArrowException) as error:
            raise CalibrationError(damaged.format(_reason(error))) from None

    try:
        table = parquet.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
        groups = (table.metadata.row_group(at) for at in range(table.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > most:
            raise grown
        return list(table.schema_arrow.names), rows()
    except (ValueError, OSError, ArrowException) as error:
        raise CalibrationError(damaged.format(_reason(error))) from None


def _reason(error: BaseException) -> str:
    return str(error).partition("\n")[0]
