"""How values read in a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: Any) -> str:
    """Four digits of a float, other values as they are, an em dash for what is missing."""
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"
    return str(value)


def size(count: float | None) -> str:
    """Decimal units, as disks and the hub count."""
    if count is None:
        return "—"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def seconds(value: float) -> str:
    """``12.3 s`` or ``4 min 05 s``."""
    return f"{value:.1f} s" if value < 59.95 else f"{int(round(value) // 60)} min {round(value) % 60:02d} s"


def percent(share: float) -> str:
    """A fraction, in percent."""
    return f"{100 * share:.4g} %"


def arrow(before: str | None, after: str) -> str:
    """``before → after``, or one of them alone."""
    return after if before is None or before == after else f"{before} → {after}"


def method(spec: Any) -> str:
    """The name in a method's spec, with the options that were given."""
    if not isinstance(spec, Mapping):
        return str(spec)
    name, options = next(iter(spec.items()))
    return f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else str(name)


def stage_title(stage: Mapping[str, Any]) -> str:
    """A stage with what tells it from another of its kind."""
    name, config = stage["stage"], stage["config"]
    if name == "prune":
        return f"prune: {method(config['method'])}, {config['pattern']}"
    if name == "recover":
        return f"recover: {config['masking']} masks, {config['losses']}"
    if name == "quantize":
        return f"quantize: {method(config['method'])}, {config['scheme']}"
    if name == "contextual":
        return f"contextual: {method(config['selector'])}"
    return f"export: {config['format']}" if name == "export" else str(name)
