"""Small pictures for a page: no wider than a phone, so that their words keep their size there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from compressllm.stages.svg import line, text

_WIDTH: Final = 360
_LEFT: Final = 52
_RIGHT: Final = 12
_SLANT: Final = 46  # that the last slanted label of a heat map reaches beyond its column

#: Curves are told apart by dashes as well as by colour.
_DASHES: Final = ("", "6 3", "2 3", "9 3 2 3")
_COLOURS: Final = ("--line", "--mark", "--other", "--ink")


class Curve(NamedTuple):
    """Points to be joined, x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


def lines_svg(curves: Sequence[Curve], title: str, across: str) -> str:
    """At most four curves over one axis, from zero if that is near.

    Args:
        curves: Each with a point at least.
        across: What the horizontal axis counts.
    """
    height, top, base = 232, 46, 192
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)
    ticks = round_ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT), 1),
            round(base - (y - low) / (high - low) * (base - top), 1),
        )

    parts = [*begin(height, title)]
    for value in ticks:
        at = place(left, value)[1]
        parts += [line("grid", _LEFT, at, _WIDTH - _RIGHT, at), text(_LEFT - 6, at + 4, f"{value:g}", "end", "small")]
    parts += [
        line("axis", _LEFT, base, _WIDTH - _RIGHT, base),
        text(_LEFT, base + 15, f"{left:.4g}", "start", "small"),
        text(_WIDTH - _RIGHT, base + 15, f"{right:.4g}", "end", "small"),
        text((_LEFT + _WIDTH - _RIGHT) / 2, base + 15, across, "middle", "small"),
    ]
    key = float(_LEFT)
    for curve, dashes, colour in zip(curves, _DASHES, _COLOURS, strict=False):
        style = f"stroke:var({colour});stroke-dasharray:{dashes or 'none'}"
        joined = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve.points))
        if len(curve.points) > 1:
            parts.append(f'<polyline class="curve" style="{style}" points="{joined}"/>')
        else:
            x, y = place(*curve.points[0])
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" style="fill:var({colour})"/>')
        parts.append(f'<path class="curve" style="{style}" d="M{key:g} {height - 10}h22"/>')
        parts.append(text(key + 27, height - 6, curve.name, "start", "small"))
        key += 40 + 6.2 * len(curve.name)
    return "\n".join([*parts, "</svg>"])


def heat_svg(cells: Mapping[tuple[int, str], float], title: str) -> str:
    """One cell for each block (down) and kind of linear (across): the stronger the colour, the larger the value.

    Args:
        cells: (block, kind) -> value; kinds come in the order they are first named.
    """
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = sorted({block for block, _ in cells})
    low, high = min(cells.values()), max(cells.values())
    top, row, column = 88, max(7.0, min(18.0, 480 / len(blocks))), (_WIDTH - 34 - _SLANT) / len(kinds)
    height = round(top + row * len(blocks) + 26)
    parts = begin(height, title)
    for place, kind in enumerate(kinds):
        x = round(34 + column * (place + 0.5), 1)
        parts.append(f'<text class="small" transform="translate({x} {top - 5}) rotate(-40)">{escape(kind)}</text>')
    every = math.ceil(13 / row)
    for place, block in enumerate(blocks):
        y = round(top + row * place, 1)
        if place % every == 0:
            parts.append(text(30, y + row / 2 + 4, str(block), "end", "small"))
        for across, kind in enumerate(kinds):
            if (value := cells.get((block, kind))) is None:
                continue
            strength = 0.06 + 0.94 * (value - low) / (high - low) if high > low else 0.5
            parts.append(
                f'<rect class="point" x="{round(34 + column * across, 1)}" y="{y}" width="{column - 1:.1f}" '
                f'height="{row - 1:.1f}" fill-opacity="{strength:.3f}">'
                f"<title>{escape(f'block {block}, {kind}: {value:.4g}')}</title></rect>"
            )
    words = f"faintest {low:.4g}, strongest {high:.4g}" if high > low else f"{low:.4g} everywhere"
    return "\n".join([*parts, text(34, height - 8, words, "start", "small"), "</svg>"])


def round_ticks(low: float, high: float) -> list[float]:
    """Three to six round values, the first at most ``low`` and the last at least ``high``; from 0 if that is near."""
    if 0 < low <= 0.5 * high:
        low = 0.0
    span = high - low if high > low else abs(high) or 1.0
    raw = span / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * many for many in (1, 2, 5, 10) if size * many >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def begin(height: int, title: str) -> list[str]:
    """The opening of a picture; its colours and letters are the page's."""
    return [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        text(8, 20, title, "start", "title"),
    ]
