"""What a stage reports to while it works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from compressllm.core.errors import RunError
from compressllm.core.ranks import ALONE, Ranks

T = TypeVar("T")

#: Where a stage keeps, in its folder, how far it is; dropped once the run's manifest has the finished stage.
JOURNAL = "progress.json"

#: Where recovery keeps, in its folder, a teacher that it trains first; dropped with the journal.
TEACHER = "teacher"

#: What is being done: always the same, or looked up after every item.
Label = str | Callable[[], str]

#: Shows progress through items: (items, how many there are, what is being done) -> the same items.
Track = Callable[[Iterable[Any], int, Label], Iterable[Any]]


def label_text(label: Label) -> str:
    """What is being done now."""
    return label if isinstance(label, str) else label()


def untracked(items: Iterable[Any], total: int, label: Label) -> Iterable[Any]:
    """Show nothing."""
    return items


def at_once(work: Callable[[], None]) -> None:
    """Do what may be put off."""
    work()


@dataclass
class Run:
    """Where a stage puts what it has to say, and what it may know of the run it is part of.

    Args:
        seed: The recipe's seed.
        folder: Existing folder for this stage's files, or None to keep everything in memory.
        show: Shows progress.
        records: What was logged, one mapping a call.
        warnings: What was warned of; goes into the manifest.
        metrics: The stage's results; go into the manifest.
        block_seconds: Decoder block -> seconds it took in this process; goes into the manifest, apart from results,
            which come out the same each time.
        ranks: The processes that share the work.
        defer: Takes what is to be done once the results are recorded where they cannot be lost; done at once where
            nobody records them.
    """

    seed: int = 0
    folder: Path | None = None
    show: Track = untracked
    on_warning: Callable[[str], None] = lambda message: None
    records: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    block_seconds: dict[str, float] = field(default_factory=dict)
    ranks: Ranks = ALONE
    defer: Callable[[Callable[[], None]], None] = at_once

    def log(self, **facts: Any) -> None:
        """Note one fact a row, a pruned linear say."""
        self.records.append(facts)

    def warn(self, message: str) -> None:
        """Say something the user should know, now and in the manifest."""
        self.warnings.append(message)
        self.on_warning(message)

    def track(self, items: Iterable[T], total: int, label: Label) -> Iterator[T]:
        """Iterate while showing how far it is."""
        yield from self.show(items, total, label)


def read_journal(path: Path, needs: Iterable[str] = ()) -> dict[str, Any]:
    """What a stage noted of how far it is.

    Args:
        needs: Keys that it must have.

    Raises: RunError if the file is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or (missing := set(needs) - found.keys()):
            raise ValueError(f"lacks {min(missing)}" if isinstance(found, dict) else "holds no mapping")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: is damaged ({error}); remove {path.parent} to do that stage again") from None
    return found
