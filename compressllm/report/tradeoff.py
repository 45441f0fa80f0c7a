"""Contextual sparsity: what few neurons a token cost, and what correction brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressllm.report.picture import Curve, lines_svg
from compressllm.report.section import Picture, Section, Table
from compressllm.report.wording import number, stage_title

#: Field of a row -> what its curve is called.
_CURVES = {
    "quality": "Quality",
    "similarity": "Likeness to the dense model's text",
    "perplexity": "Perplexity",
    "speed_ratio": "Speed, times the dense model's",
}
_COLUMNS = (
    "kind", "density", "effective_density", "quality", "similarity", "exact_match", "advance_length", "perplexity",
    "speed_ratio",
)  # fmt: skip


def tradeoff_sections(stages: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A section for each stage that measured densities."""
    return [
        _section(place, stage, stage["metrics"]["tradeoff"])
        for place, stage in enumerate(stages, 1)
        if stage["metrics"].get("tradeoff")
    ]


def _section(place: int, stage: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Section:
    pictures = []
    for field, title in _CURVES.items():
        curves = [curve for kind in ("sparse", "corrected") if (curve := _curve(kind, field, rows))]
        if curves:
            pictures.append(Picture(lines_svg(curves, title, "effective density")))
    keys = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    table = Table(
        f"Densities of stage {place}",
        [key.replace("_", " ") for key in keys],
        [[number(row.get(key)) for key in keys] for row in rows],
    )
    words = ["Effective density is the share of the MLPs' weights that a token has read, corrections included."]
    words += [f"Measured on: {stage['metrics']['rule']}."] if "rule" in stage["metrics"] else []
    return Section(
        f"Few neurons a token, stage {place}: {stage_title(stage)}", words, pictures=pictures, tables=[table]
    )


def _curve(kind: str, field: str, rows: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Of one kind, with the dense model as the point that all curves end in."""
    points = [
        (float(row["effective_density"]), float(row[field]))
        for row in rows
        if row["kind"] in (kind, "dense") and row.get(field) is not None and row.get("effective_density") is not None
    ]
    own = any(row["kind"] == kind and row.get(field) is not None for row in rows)
    return Curve(kind, sorted(points)) if own else None
