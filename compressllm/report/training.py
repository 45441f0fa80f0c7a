"""Curves of a recovery: losses, held-out loss, flip rates, learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressllm.report.picture import Curve, lines_svg
from compressllm.report.section import Picture, Section, Table
from compressllm.report.wording import number, stage_title

_LOSSES = ("loss", "ce", "kl", "reverse_kl", "squarehead")
_FLIPS = {"flip_rate": "since last choice", "flip_rate_from_first": "since the first"}
_MOST_POINTS = 300  # more than a picture has pixels for only make the file larger
_MOST_ROWS = 60


def training_section(place: int, stage: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Section:
    """What stage number ``place`` wrote while it trained."""
    whole, *losses = (_curve(name, name, rows) for name in _LOSSES)
    if whole and all(not part or part.points != whole.points for part in losses):  # not of one part alone
        losses = [whole, *losses]
    pictures = _picture(losses, "Training loss")
    pictures += _picture([_curve("held_out_nll", "held out", rows)], "Held-out loss, nats a token")
    pictures += _picture([_curve(key, name, rows) for key, name in _FLIPS.items()], "Share of the mask that changed")
    pictures += _picture([_curve("lr", "learning rate", rows)], "Learning rate")
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    every = max(1, math.ceil(len(steps) / _MOST_ROWS))
    shown = [row for at, row in enumerate(steps.values()) if at % every == 0 or at == len(steps) - 1]
    keys = list(dict.fromkeys(key for row in steps.values() for key in row))
    table = Table(
        f"{len(shown)} of the {len(steps)} steps of stage {place}",
        [key.replace("_", " ") for key in keys],
        [[number(row.get(key)) for key in keys] for row in shown],
        folded=True,
    )
    return Section(f"Training, stage {place}: {stage_title(stage)}", pictures=pictures, tables=[table])


def _curve(key: str, name: str, rows: Sequence[Mapping[str, Any]]) -> Curve | None:
    points = [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    return Curve(name, [*points[:-1:every], points[-1]]) if points else None


def _picture(curves: Sequence[Curve | None], title: str) -> list[Picture]:
    drawn = [curve for curve in curves if curve]
    return [Picture(lines_svg(drawn[:4], title, "step"))] if drawn else []
