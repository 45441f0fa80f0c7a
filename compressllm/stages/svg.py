"""Pieces of SVG files that need nothing else and read on light and on dark."""

from __future__ import annotations

from typing import Final
from xml.sax.saxutils import escape

STYLE: Final = """
  svg { --ink: #1f2328; --faint: #d0d7de; --page: #ffffff; --line: #0969da; --mark: #bc4c00; --other: #8250df; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6edf3; --faint: #3d444d; --page: #0d1117; --line: #58a6ff; --mark: #f0883e; --other: #bc8cff; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--ink); }
  .title { font-size: 15px; font-weight: 600; }
  .small { font-size: 11px; }
  .page { fill: var(--page); }
  .grid { stroke: var(--faint); stroke-width: 1; }
  .axis { stroke: var(--ink); stroke-width: 1; }
  .curve { fill: none; stroke: var(--line); stroke-width: 2; }
  .point { fill: var(--line); }
  .other { fill: var(--other); }
  .dense { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 5 4; }
  .knee { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 3 3; }
  .ring { fill: none; stroke: var(--mark); stroke-width: 2; }
  .marked { fill: var(--mark); }
"""


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of a class of `STYLE`."""
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """A text that starts, ends or has its middle at (x, y)."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
