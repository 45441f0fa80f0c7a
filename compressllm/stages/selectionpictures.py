"""Pictures of a selection: a map of the clusters, and the budget of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

from compressllm.stages.svg import STYLE, line, text

_WIDTH: Final = 720
_SIDE: Final = 460  # of the square map
_MARGIN: Final = 24
_ROW: Final = 26  # of the bars
# From little to much damage. Blue to orange, told apart by every kind of sight and on light and dark.
_COLD, _HOT = (9, 105, 218), (225, 87, 20)
_WORDS: Final = 34  # characters of a cluster's phrases


def map_svg(places: Sequence[Sequence[float]], labels: Sequence[int], clusters: Sequence[Mapping[str, Any]]) -> str:
    """Prompts as points, near where they mean the like, coloured by how damaged their cluster is.

    Args:
        places: (m, 2) in [0, 1].
        labels: (m,) cluster of each.
        clusters: With ``cluster``, ``degradation`` and ``phrases``.
    """
    height = _SIDE + 96
    colours = _colours(clusters)
    parts = _begin(height, "Clusters of prompts, coloured by degradation")
    for (across, down), label in zip(places, labels, strict=True):
        x, y = _MARGIN + across * _SIDE, 48 + down * _SIDE
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colours[label]}" fill-opacity="0.7"/>')
    by_label: dict[int, list[Sequence[float]]] = {}
    for place, label in zip(places, labels, strict=True):
        by_label.setdefault(label, []).append(place)
    for label, own in sorted(by_label.items()):
        x, y = (sorted(place[axis] for place in own)[len(own) // 2] for axis in (0, 1))
        parts.append(text(_MARGIN + x * _SIDE, 48 + y * _SIDE + 5, str(label), "middle", "title"))
    left = _MARGIN + _SIDE + 20
    for row, one in enumerate(sorted(clusters, key=lambda one: -one["degradation"])):
        y = 58 + row * min(18, _SIDE / len(clusters))
        words = _short(", ".join(one["phrases"]) or "no phrases", 26)
        parts.append(f'<circle cx="{left}" cy="{y - 4:.1f}" r="5" fill="{colours[one["cluster"]]}"/>')
        parts.append(text(left + 10, y, f"{one['cluster']}: {words}", "start", "small"))
    least, most = _range(clusters)
    words = f"blue: divergence {least:.4f}; orange: {most:.4f} nats a response token"
    parts.append(text(_MARGIN, height - 16, words, "start", "small"))
    return "\n".join([*parts, "</svg>", ""])


def budget_svg(clusters: Sequence[Mapping[str, Any]], budget: int) -> str:
    """A bar for each cluster: how many of its records were chosen, of how many, and how damaged it is.

    Args:
        clusters: With ``cluster``, ``records``, ``budget``, ``degradation`` and ``phrases``.
        budget: Of all together.
    """
    height = 64 + _ROW * len(clusters) + 24
    colours = _colours(clusters)
    parts = _begin(height, f"{budget} records over {len(clusters)} clusters")
    left, right = 250, _WIDTH - 170
    longest = max(one["budget"] for one in clusters) or 1
    for row, one in enumerate(sorted(clusters, key=lambda one: (-one["budget"], one["cluster"]))):
        y = 48 + row * _ROW
        words = _short(f"{one['cluster']}: {', '.join(one['phrases']) or 'no phrases'}", _WORDS)
        wide = one["budget"] / longest * (right - left)
        share = f"{one['budget']} of {one['records']} ({one['budget'] / one['records']:.0%}), {one['degradation']:.4f}"
        parts += [
            text(left - 8, y + 14, words, "end", "small"),
            f'<rect x="{left}" y="{y + 2}" width="{wide:.1f}" height="{_ROW - 8}" fill="{colours[one["cluster"]]}"/>',
            text(left + wide + 6, y + 14, share, "start", "small"),
        ]
    parts.append(line("axis", left, 44, left, 48 + _ROW * len(clusters)))
    words = "chosen of all records of the cluster, and its divergence in nats a response token"
    parts.append(text(left, height - 14, words, "start", "small"))
    return "\n".join([*parts, "</svg>", ""])


def _begin(height: float, title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
        text(_MARGIN, 26, title, "start", "title"),
    ]


def _range(clusters: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    degradations = [one["degradation"] for one in clusters]
    return min(degradations), max(degradations)


def _colours(clusters: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    least, most = _range(clusters)
    made = {}
    for one in clusters:
        part = (one["degradation"] - least) / ((most - least) or 1.0)
        red, green, blue = (round(cold + (hot - cold) * part) for cold, hot in zip(_COLD, _HOT, strict=True))
        made[one["cluster"]] = f"rgb({red},{green},{blue})"
    return made


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1].rstrip(" ,") + "…"
