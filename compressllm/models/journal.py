"""The journal of a walk that writes a checkpoint: which blocks are finished, and what they depend on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressllm.core.atomic import drop_scratch, put_in_place, write_json
from compressllm.core.errors import RunError
from compressllm.core.run import JOURNAL, read_journal

Rows = list[dict[str, Any]]


class Journal:
    """Takes up a folder that an interrupted walk left, or begins anew in it.

    Args:
        folder: Existing folder; ``model.partial`` in it is worked in, and becomes ``model``.
        fingerprint: Everything the results depend on.

    Raises: RunError for a journal with another fingerprint, or a finished checkpoint without one.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.final, self.work = folder / "model", folder / "model.partial"
        self._path = folder / JOURNAL
        self._fingerprint = json.loads(json.dumps(fingerprint))
        #: Paths of the finished blocks, and what was logged of their linears.
        self.blocks: list[str]
        self.rows: Rows
        self.blocks, self.rows = self._resume()
        self.work.mkdir(exist_ok=True)

    def note(self, block: str, rows: Rows) -> None:
        """A block is finished, and its bytes are synced."""
        self.blocks.append(block)
        self.rows += rows
        write_json(self._path, {"fingerprint": self._fingerprint, "blocks": self.blocks, "rows": self.rows})

    def finish(self) -> None:
        """Move the checkpoint into place. The journal stays: if killed now, the next call ends where this one did."""
        put_in_place(self.work, self.final)

    def _resume(self) -> tuple[list[str], Rows]:
        if self.final.exists() and not self._path.exists():
            raise RunError(f"{self.final}: exists already; give a new folder")
        if not self._path.exists() or not (self.work.exists() or self.final.exists()):
            self._path.unlink(missing_ok=True)  # its checkpoint was taken away
            shutil.rmtree(self.work, ignore_errors=True)  # killed before its first block was finished
            return [], []
        progress = read_journal(self._path, {"fingerprint", "blocks", "rows"})
        changed = [key for key, value in self._fingerprint.items() if progress["fingerprint"].get(key) != value]
        if changed:
            raise RunError(
                f"{self.work.parent}: was begun with another {', '.join(changed)}; "
                "restore it, or start again in a new folder"
            )
        if self.final.exists():
            self.final.replace(self.work)
        drop_scratch(self.work)
        return list(progress["blocks"]), list(progress["rows"])
