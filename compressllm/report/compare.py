"""Runs and measurements side by side, and whether perplexity rose or accuracy fell too far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressllm.core.errors import RecipeError
from compressllm.eval.gate import comparable, differences, judge, rise_between
from compressllm.eval.paired import Rise
from compressllm.eval.scores import accuracy_metric
from compressllm.report.accuracies import Accuracy, compare_tasks
from compressllm.report.contender import Contender

_FEW_WINDOWS = 10


@dataclass(frozen=True)
class Line:
    """One row of the comparison.

    Args:
        name: Which contender.
        perplexity: Of the text that was compared; None if only tasks were.
        rise: Over the first contender's, with bounds; None of the first itself. Without losses by window there are no
            bounds, and both are the value.
        paired: Whether there were.
        verdict: Of perplexity: ``passed``, ``failed``, or ``within noise``: over the limit, but not beyond what chance
            may do.
        accuracies: On the tasks that all have, the mean last, each with a verdict of its own.
        facts: The contender's.
    """

    name: str
    perplexity: float | None
    rise: Rise | None
    paired: bool
    verdict: str | None
    accuracies: list[Accuracy]
    facts: dict[str, Any]

    @property
    def failed(self) -> bool:
        """Whether anything failed."""
        return "failed" in (self.verdict, *(one.verdict for one in self.accuracies))

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name,
            "perplexity": self.perplexity,
            "rise": self.rise._asdict() if self.rise else None,
            "paired": self.paired,
            "verdict": self.verdict,
            "accuracies": [one.as_json() for one in self.accuracies],
            "failed": self.failed,
            "facts": self.facts,
        }


@dataclass(frozen=True)
class Comparison:
    """What came of it.

    Args:
        lines: The first is what the others are held against.
        protocol: What the perplexities are of.
        allowed: Largest relative rise of perplexity, or None without a gate.
        drop: Largest fall of an accuracy as a fraction, or None without a gate.
        confidence: Of each bound on perplexity, and of all that are said of one contender's accuracies together.
        warnings: What to know before believing it.
    """

    lines: list[Line]
    protocol: str
    allowed: float | None
    drop: float | None
    confidence: float
    warnings: list[str]

    @property
    def failed(self) -> list[Line]:
        """Those that are worse than is allowed."""
        return [line for line in self.lines if line.failed]


def compare(
    contenders: Sequence[Contender],
    allowed: float | None = None,
    confidence: float = 0.95,
    drop: float | None = None,
) -> Comparison:
    """Hold all but the first against the first.

    Compared is the last text of the first contender that all the others were measured on too, and every task that all
    have. With losses by window a contender fails if its rise is beyond ``allowed`` with the confidence asked for, so
    that of models that rose just as far as is allowed, few fail; without them it fails if the rise itself is.
    Accuracies are judged likewise, see `compare_tasks`.

    Args:
        contenders: Two at least.
        allowed: Relative rise of perplexity that is let pass; None only compares.
        confidence: Above 0.5, below 1.
        drop: Fall of accuracy that is let pass, as a fraction; None only compares.

    Raises: RecipeError if what is to be judged was not measured on all, or there is nothing to compare.
    """
    first, *others = contenders
    common = [task for task in first.tasks if all(task in other.tasks for other in others)]
    shared = [task for task in common if accuracy_metric(first.tasks[task])]
    if drop is not None and not shared:
        raise RecipeError(
            f"{others[0].name}: has no task in common with {first.name}; "
            "measure both with the same compressllm eval --tasks"
        )
    base = None if shared and allowed is None and not _all_have_text(contenders) else _common_base(contenders)
    warnings = [f"{task}: has no accuracy, so it is not compared" for task in common if task not in shared]
    if base and base.get("windows", _FEW_WINDOWS) < _FEW_WINDOWS:
        warnings.append(f"{base['windows']} windows are few to tell chance by; measure {_FEW_WINDOWS} or more")
    perplexity = float(base["perplexity"]) if base else None
    lines = [Line(first.name, perplexity, None, False, None, compare_tasks(first, first, shared), first.facts)]
    for contender in others:
        accuracies = compare_tasks(first, contender, shared, drop, confidence)
        if not all(one.paired for one in accuracies):
            warnings.append(
                f"{contender.name}: there are no scores of single items on both sides, so accuracies are compared as "
                "if of different items; measure again with compressllm eval --json"
            )
        if base is None:
            lines.append(Line(contender.name, None, None, False, None, accuracies, contender.facts))
            continue
        measured = next(one for one in reversed(contender.measured) if comparable(base, one))
        rise, paired = rise_between(base, measured, confidence)
        if not paired:
            warnings.append(
                f"{contender.name}: there are no losses by window on both sides, so the rise is taken as it is, chance "
                "included; measure again with compressllm eval --json"
            )
        verdict = None if allowed is None else judge(rise, allowed)
        lines.append(
            Line(contender.name, float(measured["perplexity"]), rise, paired, verdict, accuracies, contender.facts)
        )
    return Comparison(lines, base.get("protocol", "") if base else "", allowed, drop, confidence, warnings)


def _all_have_text(contenders: Sequence[Contender]) -> bool:
    return all(contender.measured for contender in contenders)


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
