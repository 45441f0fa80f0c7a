"""The gate: a baseline on disk, and whether a new measurement is worse than it by more than is allowed and chance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressllm.core.atomic import write_json
from compressllm.core.errors import FormatError, RecipeError
from compressllm.eval.accuracy import Drop
from compressllm.eval.paired import Rise, paired_rise

#: Two measurements compare only if they agree on all of these.
_SAME = ("ids_sha256", "seqlen", "windows", "dtype")


def parse_increase(text: str, option: str = "--max-increase") -> float:
    """``"1%"`` or ``"0.01"`` as a fraction. Raises RecipeError."""
    try:
        value = float(text.rstrip().removesuffix("%")) / (100.0 if text.rstrip().endswith("%") else 1.0)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 100.0:
        raise RecipeError(f"{option} {text}: give a percentage as in 1%, or a fraction as in 0.01")
    return value


def write_baseline(path: Path, measured: Mapping[str, Any]) -> None:
    """Put a measurement into a baseline file, in the place of an older one of the same text and settings."""
    kept = [old for old in read_baseline(path) if not comparable(old, measured)] if path.exists() else []
    write_json(path, {"version": 1, "measurements": [*kept, dict(measured)]})


def find_baseline(path: Path, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline's measurement of the same text with the same settings.

    Raises: FormatError if the file cannot be read; RecipeError if it has none that compares.
    """
    known = read_baseline(path)
    for old in known:
        if comparable(old, measured):
            return old
    differ = differences(known[-1], measured) if known else []
    raise RecipeError(
        f"{path}: has no measurement of this text with these settings"
        + (f" ({', '.join(differ)} differ)" if differ else "")
        + "; add one with --write-baseline"
    )


def rise_between(
    baseline: Mapping[str, Any], measured: Mapping[str, Any], confidence: float = 0.95
) -> tuple[Rise, bool]:
    """Relative rise in perplexity with bounds, and whether they are of the same windows' losses.

    Without losses by window on both sides both bounds are the value.
    """
    before, after = baseline.get("window_nll") or [], measured.get("window_nll") or []
    if len(before) == len(after) > 0:
        return paired_rise(before, after, confidence), True
    return Rise(*[float(measured["perplexity"]) / float(baseline["perplexity"]) - 1.0] * 3), False


def judge(change: Rise | Drop, allowed: float) -> str:
    """``passed``; ``failed`` if it is over the limit beyond chance; ``within noise`` if over, but not beyond chance."""
    if not change.low <= allowed:  # so that nan, of two ruined models, fails
        return "failed"
    return "within noise" if change.value > allowed else "passed"


def read_baseline(path: Path) -> list[dict[str, Any]]:
    """The measurements in a baseline file. Raises FormatError if it is none."""
    try:
        measurements = json.loads(path.read_text())["measurements"]
        if not all(float(one["perplexity"]) > 0 for one in measurements):
            raise ValueError("a perplexity is not positive")
        return list(measurements)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}; make it with --write-baseline") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: is not a baseline file ({error}); make it with --write-baseline") from None


def comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two perplexities are of the same text, cut up and computed alike."""
    return not differences(old, new)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps two perplexities from being compared."""
    return [key for key in _SAME if old.get(key) != new.get(key)]
