"""What training tells of itself while it runs: one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compressllm.core.atomic import naming, write_atomically

FILE_NAME = "metrics.jsonl"


class Metrics:
    """Writes ``metrics.jsonl``, each line whole and at once.

    Args:
        folder: Where; None keeps nothing.
        resumed: Step that training goes on after: lines of later steps are dropped, since they come again.
    """

    def __init__(self, folder: Path | None, resumed: int = 0) -> None:
        self._path = folder / FILE_NAME if folder else None
        if self._path:
            kept = [row for row in read_metrics(self._path) if row["step"] <= resumed] if resumed else []
            write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row: Any) -> None:
        """Add one line."""
        if self._path:
            with naming(self._path), self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Make what was written so far survive a power cut."""
        if self._path:
            with naming(self._path), self._path.open("a") as file:
                os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
