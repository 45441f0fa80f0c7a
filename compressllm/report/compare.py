"""Runs and measurements side by side, and whether perplexity rose too far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressllm.core.errors import FormatError, RecipeError
from compressllm.eval.gate import comparable, differences
from compressllm.eval.paired import Rise, paired_rise
from compressllm.report.record import read_run

_FEW_WINDOWS = 10


@dataclass(frozen=True)
class Contender:
    """One of what is compared.

    Args:
        name: As it was given.
        measured: Perplexities and how they were measured, in order.
        facts: Of a run: sparsity, bytes, seconds and peak memory; empty of a measurement alone.
    """

    name: str
    measured: list[dict[str, Any]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One row of the comparison.

    Args:
        name: Which contender.
        perplexity: Of the text that was compared.
        rise: Over the first contender's, with bounds; None of the first itself. Without losses by window there are no
            bounds, and both are the value.
        paired: Whether there were.
        verdict: ``passed``, ``failed``, or ``within noise``: over the limit, but not beyond what chance may do.
        facts: The contender's.
    """

    name: str
    perplexity: float
    rise: Rise | None
    paired: bool
    verdict: str | None
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "rise": self.rise._asdict() if self.rise else None}


@dataclass(frozen=True)
class Comparison:
    """What came of it.

    Args:
        lines: The first is what the others are held against.
        protocol: What the perplexities are of.
        allowed: Largest relative rise, or None without a gate.
        confidence: Of each bound.
        warnings: What to know before believing it.
    """

    lines: list[Line]
    protocol: str
    allowed: float | None
    confidence: float
    warnings: list[str]

    @property
    def failed(self) -> list[Line]:
        """Those that rose too far."""
        return [line for line in self.lines if line.verdict == "failed"]


def read_contender(name: str) -> Contender:
    """Read a run folder, what ``eval --json`` printed, or a baseline file.

    Raises: RunError, FormatError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        stages = read_run(path).stages
        metrics = [stage["metrics"] for stage in stages]
        facts: dict[str, Any] = {}
        for one in metrics:
            facts |= {key: one[key] for key in ("sparsity", "bytes_after") if key in one}
        if stages:
            facts["seconds"] = sum(stage["seconds"] for stage in stages)
            facts["peak_memory_bytes"] = max(stage["peak_memory_bytes"] for stage in stages)
        return Contender(name, [one for one in metrics if "perplexity" in one], facts)
    try:
        found = json.loads(path.read_text())
        measured = found.get("measurements", [found])
        if not all(float(one["perplexity"]) > 0 for one in measured):
            raise ValueError("a perplexity is not positive")
    except OSError as error:
        raise FormatError(f"{name}: cannot be read: {error.strerror}; give a run folder or a JSON file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{name}: holds no perplexity ({error}); make it with compressllm eval --json") from None
    return Contender(name, measured, {})


def compare(contenders: Sequence[Contender], allowed: float | None = None, confidence: float = 0.95) -> Comparison:
    """Hold all but the first against the first.

    Compared is the last text of the first contender that all the others were measured on too. With losses by window a
    contender fails if its rise is beyond ``allowed`` with the confidence asked for, so that of models that rose just as
    far as is allowed, few fail; without them it fails if the rise itself is.

    Args:
        contenders: Two at least.
        allowed: Relative rise that is let pass; None only compares.
        confidence: Above 0.5, below 1.

    Raises: RecipeError if there is no such text.
    """
    base = _common_base(contenders)
    first = contenders[0]
    lines = [Line(first.name, base["perplexity"], None, False, None, first.facts)]
    warnings = []
    if base.get("windows", _FEW_WINDOWS) < _FEW_WINDOWS:
        warnings.append(f"{base['windows']} windows are few to tell chance by; measure {_FEW_WINDOWS} or more")
    for contender in contenders[1:]:
        measured = next(one for one in reversed(contender.measured) if comparable(base, one))
        before, after = base.get("window_nll") or [], measured.get("window_nll") or []
        paired = len(before) == len(after) > 0
        if paired:
            rise = paired_rise(before, after, confidence)
        else:
            rise = Rise(*[measured["perplexity"] / base["perplexity"] - 1.0] * 3)
            warnings.append(
                f"{contender.name}: there are no losses by window on both sides, so the rise is taken as it is, chance "
                "included; measure again with compressllm eval --json"
            )
        verdict = None if allowed is None else _verdict(rise, allowed)
        lines.append(Line(contender.name, measured["perplexity"], rise, paired, verdict, contender.facts))
    return Comparison(lines, base.get("protocol", ""), allowed, confidence, warnings)


def _verdict(rise: Rise, allowed: float) -> str:
    if not rise.low <= allowed:  # so that nan, of two ruined models, fails
        return "failed"
    return "within noise" if rise.value > allowed else "passed"


def _common_base(contenders: Sequence[Contender]) -> dict[str, Any]:
    for contender in contenders:
        if not contender.measured:
            raise RecipeError(
                f"{contender.name}: holds no perplexity; add an eval stage, or give compressllm eval --json"
            )
    first, *others = contenders
    base: dict[str, Any]
    for base in reversed(first.measured):
        if all(any(comparable(base, one) for one in other.measured) for other in others):
            return base
    base = first.measured[-1]
    odd = next((other for other in others if not any(comparable(base, one) for one in other.measured)), others[0])
    differ = ", ".join(differences(base, odd.measured[-1]))
    raise RecipeError(
        f"{odd.name}: was not measured on the text of {first.name} with the same settings ({differ} differ); "
        "measure both with the same compressllm eval"
    )
