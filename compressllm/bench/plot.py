"""Bars with their spread, as an SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from compressllm.stages.svg import STYLE, line, text

_WIDTH, _ROW, _TOP, _LEFT, _RIGHT = 720, 26, 56, 210, 70
_BARS = ".bar { fill: var(--line); } .rival { fill: var(--faint); }"


class Bar(NamedTuple):
    """One bar.

    Args:
        label: At its left.
        value: Its length; ``low`` and ``high`` are the ends of its spread.
        rival: Drawn pale.
    """

    label: str
    value: float
    low: float
    high: float
    rival: bool = False


def bars_svg(bars: Sequence[Bar], title: str, unit: str) -> str:
    """Horizontal bars from zero, one below the other, each with its value and a line from low to high."""
    scale = (_WIDTH - _LEFT - _RIGHT) / max(max(bar.value, bar.high) for bar in bars)
    height = _TOP + _ROW * len(bars) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{_BARS}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
        text(16, 24, title, "start", "title"),
        text(_LEFT, 44, unit, "start", "small"),
    ]
    for row, bar in enumerate(bars):
        top = _TOP + _ROW * row
        middle, end = top + 9, round(_LEFT + bar.value * scale, 2)
        kind = "rival" if bar.rival else "bar"
        parts += [
            text(_LEFT - 8, middle + 4, bar.label, "end", "small"),
            f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{round(bar.value * scale, 2)}" height="18"/>',
            line("axis", round(_LEFT + bar.low * scale, 2), middle, round(_LEFT + bar.high * scale, 2), middle),
            text(max(end, _LEFT + bar.high * scale) + 6, middle + 4, f"{bar.value:.4g}", "start", "small"),
        ]
    return "\n".join([*parts, line("axis", _LEFT, _TOP - 4, _LEFT, height - 12), "</svg>", ""])
