"""The sweep's curve as an SVG file that needs nothing else and reads on light and on dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

from compressllm.stages.svg import STYLE, line, text

_WIDTH, _HEIGHT = 720, 456
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 76, 60  # margins
_STEPS: Final = ((1, 10), (1, 3, 10), (1, 2, 5, 10), (1, 1.5, 2, 3, 4, 5, 6, 8, 10))

# How far above the dense loss the axis goes, in nats; ruined models beyond it are drawn at its end.
_REACH: Final = 12.0


def sweep_svg(points: Sequence[Mapping[str, Any]], knee: Mapping[str, Any], title: str) -> str:
    """Perplexity, on a logarithmic axis, against sparsity; the knees are marked.

    Args:
        points: With ``sparsity``, ``nll`` and ``pattern``; the first is the dense model. N:M patterns are drawn
            apart from the curve of the others.
        knee: Kind -> the point of it, or None, as the sweep's result has it.
        title: Shown above.
    """
    losses = [point["nll"] for point in points]
    low, high = min(losses), min(max(losses), losses[0] + _REACH)
    pad = max(0.06 * (high - low), 0.02)
    low, high = low - pad, high + pad
    right = min(1.0, max(point["sparsity"] for point in points) + 0.05)

    def x(sparsity: float) -> float:
        return _rounded(_LEFT + sparsity / right * (_WIDTH - _LEFT - _RIGHT))

    def y(loss: float) -> float:
        return _rounded(_TOP + (high - min(loss, high)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM))

    base = _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for value in _ticks(low, high):
        at = y(math.log(value))
        parts += [line("grid", _LEFT, at, _WIDTH - _RIGHT, at), text(_LEFT - 8, at + 4, f"{value:g}", "end")]
    for tenth in range(math.floor(right * 10 + 1e-9) + 1):
        at = x(tenth / 10)
        parts += [line("axis", at, base, at, base + 5), text(at, base + 20, f"{tenth * 10} %", "middle")]
    parts += [
        line("axis", _LEFT, base, _WIDTH - _RIGHT, base),
        line("axis", _LEFT, _TOP, _LEFT, base),
        text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, "weights removed from the prunable linears", "middle"),
        f'<text transform="translate(18 {(_TOP + base) / 2}) rotate(-90)" text-anchor="middle">perplexity (log)</text>',
        line("dense", _LEFT, y(losses[0]), _WIDTH - _RIGHT, y(losses[0])),
        text(_WIDTH - _RIGHT - 4, y(losses[0]) + 15, "dense", "end", "small"),
    ]
    curve = sorted((point["sparsity"], point["nll"]) for point in points if ":" not in point["pattern"])
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x(s)},{y(loss)}" for s, loss in curve)}"/>')
    for point in points:
        across, down = x(point["sparsity"]), y(point["nll"])
        label = escape(f"{point['pattern']}: perplexity {_perplexity(point['nll'])}")
        if ":" in point["pattern"]:
            parts.append(f'<path class="other" d="M{across} {down - 6}l6 6l-6 6l-6 -6z"><title>{label}</title></path>')
            parts.append(text(across - 9, down + 4, point["pattern"], "end", "small"))
        else:
            parts.append(f'<circle class="point" cx="{across}" cy="{down}" r="3.5"><title>{label}</title></circle>')
    return "\n".join([*parts, *_knees(knee, x, y, base), "</svg>", ""])


def _knees(knee: Mapping[str, Any], x: Any, y: Any, base: float) -> list[str]:
    """A ring and an upright line at each knee; knees at one point share them."""
    names: dict[tuple[float, float], list[str]] = {}
    for kind, point in knee.items():
        if isinstance(point, Mapping):
            names.setdefault((point["sparsity"], point["nll"]), []).append(kind)
    parts = []
    for row, ((sparsity, loss), kinds) in enumerate(sorted(names.items())):
        at, top = x(sparsity), 46 + 13 * row
        side = "end" if at > _WIDTH / 2 else "start"
        shift = -4 if side == "end" else 4
        parts += [
            line("knee", at, top - 8, at, base),
            f'<circle class="ring" cx="{at}" cy="{y(loss)}" r="7"/>',
            text(at + shift, top, f"{100 * sparsity:.3g} %: knee by {', '.join(kinds)}", side, "small marked"),
        ]
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Round perplexities between two losses: the coarsest steps that give four of them, or else the finest."""
    found: list[float] = []
    for steps in _STEPS:
        decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
        found = sorted({step * 10.0**decade for decade in decades for step in steps})
        found = [value for value in found if low <= math.log(value) <= high]
        if len(found) >= 4:
            return found
    if len(found) < 3:  # all within a narrow range
        return [float(f"{math.exp(low + (high - low) * part / 4):.3g}") for part in range(1, 4)]
    return found


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else f"e^{loss:.0f}"


def _rounded(value: float) -> float:
    return round(float(value), 2)
