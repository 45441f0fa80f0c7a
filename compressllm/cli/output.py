"""Results go to stdout, talk to stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from compressllm.core.run import Label, label_text

T = TypeVar("T")

talk = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def say(message: str, style: str | None = None) -> None:
    """One line to stderr, not wrapped."""
    talk.print(message, style=style, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """A warning to stderr."""
    say(f"warning: {message}", style="yellow")


def show(items: Iterable[T], total: int, label: Label) -> Iterable[T]:
    """Progress bar with elapsed and remaining time on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=talk) as progress:
        task = progress.add_task(label_text(label), total=total)
        for item in items:
            yield item
            progress.update(task, advance=1, description=label_text(label))


def print_json(value: Any) -> None:
    """JSON to stdout."""
    typer.echo(json.dumps(value, indent=2))


def bytes_text(count: float) -> str:
    """``"269.1 MB"``: decimal units, as disks and the hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """``"12.3 s"`` or ``"4 min 05 s"``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{math.floor(seconds / 60)} min {round(seconds % 60):02d} s"


def flag(config: type[BaseModel], name: str, more: str = "", names: tuple[str, ...] = ()) -> Any:
    """The option that sets a config's field: help and default are the field's own.

    Args:
        names: Names of the option besides the field's, which is then taken with underscores too, as lm-eval has it.
    """
    field = config.model_fields[name]
    text = f"{(field.description or '').replace('`', '')} {more}".strip()
    spelled = tuple(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}", *names))) if names else ()
    shown = str(field.default) if field.default not in (None, ()) else False
    return typer.Option(*spelled, help=text, show_default=shown)


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were given, so that those left out fall to the config's defaults."""
    return {name: value for name, value in flags.items() if value is not None and value != []}
