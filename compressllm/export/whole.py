"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from compressllm.core.atomic import put_in_place
from compressllm.core.errors import FormatError
from compressllm.core.lock import Lock


@contextlib.contextmanager
def appears_whole(out: Path) -> Iterator[Path]:
    """A scratch folder beside ``out`` that takes its place when the block succeeds, and vanishes when it does not.

    What a killed call left there is removed; two calls at once are kept apart by a lock.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Lock(out.with_name(f".{out.name}.lock"), out):
            if out.is_file() or (out.is_dir() and any(out.iterdir())):
                raise FormatError(f"{out}: exists already and holds something; name a new folder")
            work = out.with_name(f".{out.name}.partial")
            shutil.rmtree(work, ignore_errors=True)
            try:
                work.mkdir()
                yield work
                put_in_place(work, out)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise FormatError(f"{out}: cannot be written: {error.strerror or error}") from None
