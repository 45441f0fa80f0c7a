"""Settings of a run held against those it was begun with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Every value of two pieces of plain data that differs, as ``stages.0.recover.lr: 0.0003 then, 0.001 now``."""
    pairs = _pairs(before, now)
    if pairs is None:
        return [] if before == now else [f"{path}: {before!r} then, {now!r} now"]
    return [line for key, (one, other) in pairs.items() for line in differences(one, other, f"{path}.{key}".strip("."))]


def _pairs(before: Any, now: Any) -> dict[Any, tuple[Any, Any]] | None:
    """Key or place -> what both have there; None unless both are mappings, or lists of one length."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return {key: (before.get(key), now.get(key)) for key in dict.fromkeys([*before, *now])}
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return dict(enumerate(zip(before, now, strict=True)))
    return None
