"""Training records that were chosen: a map of their clusters, and the budget of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressllm.report.section import Picture, Section, Table
from compressllm.report.wording import number
from compressllm.stages.selectionpictures import budget_svg, map_svg

_COLUMNS = ("cluster", "records", "budget", "degradation", "phrases")


def selection_section(name: str, selection: Mapping[str, Any]) -> Section:
    """What ``compressllm select`` told of its choice into file ``name``."""
    clusters = selection["clusters"]
    pictures = []
    if all(key in cluster for cluster in clusters for key in _COLUMNS):
        flat = selection.get("map") or {}
        if flat.get("places"):
            pictures.append(Picture(map_svg(flat["places"], flat["clusters"], clusters), wide=True))
        if "budget" in selection:
            pictures.append(Picture(budget_svg(clusters, selection["budget"]), wide=True))
    words = [f"{selection['budget']} records were chosen."] if "budget" in selection else []
    if pictures:
        words.append("A cluster's degradation is how far the pruned model's responses are from the dense model's.")
    keys = [key for key in _COLUMNS if key in clusters[0]]
    rows = [[_listed(cluster.get(key)) for key in keys] for cluster in clusters]
    return Section(f"Training records: {name}", words, pictures=pictures, tables=[Table("Clusters", keys, rows)])


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else number(value)
