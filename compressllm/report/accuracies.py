"""Accuracies of two contenders on the same tasks, and whether they fell too far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressllm.core.errors import RecipeError
from compressllm.eval.accuracy import Drop, paired_drop, unpaired_drop
from compressllm.eval.gate import judge
from compressllm.eval.scores import accuracy_metric
from compressllm.report.contender import Contender

#: What the mean over all tasks is called where tasks are named.
MEAN = "mean"


@dataclass(frozen=True)
class Accuracy:
    """A contender's accuracy on one task.

    Args:
        task: Its name, or ``mean`` for the mean over the tasks.
        metric: lm-eval's name of what was measured; empty of the mean.
        value: 0 to 1.
        stderr: Its standard error, or None if it is not known.
        drop: From the first contender's, with bounds; None of the first itself.
        paired: Whether the bounds are of the same items' scores.
        verdict: ``passed``, ``failed``, ``within noise``, or None without a gate.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    drop: Drop | None
    paired: bool
    verdict: str | None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "drop": self.drop._asdict() if self.drop else None}


def compare_tasks(
    first: Contender,
    other: Contender,
    tasks: Sequence[str],
    allowed: float | None = None,
    confidence: float = 0.95,
) -> list[Accuracy]:
    """A contender's accuracies on the tasks, and their mean if they are several, against the first's.

    The chance of a false alarm, ``1 - confidence``, is shared evenly by all that is judged, so that it is not larger
    for many tasks than for one (Bonferroni).

    Args:
        tasks: Tasks that both have, each with an accuracy.

    Raises: RecipeError if a task's items or prompts differ.
    """
    each = confidence if len(tasks) < 2 else 1 - (1 - confidence) / (len(tasks) + 1)
    found, scores = [], []
    for task in tasks:
        before, after = first.tasks[task], other.tasks[task]
        if before["items_sha256"] != after["items_sha256"]:
            raise RecipeError(
                f"{other.name}: was asked other items of {task} than {first.name}, or in another way "
                f"({_asked(after)} against {_asked(before)}); measure both with the same compressllm eval"
            )
        metric = accuracy_metric(before) or ""
        pair = [one.get("scores", {}).get(metric, []) for one in (before, after)]
        value, stderr = _number(after, metric)
        drop, paired = None, len(pair[0]) == len(pair[1]) > 0
        if other is not first:
            drop = (
                paired_drop(pair[:1], pair[1:], each)
                if paired
                else unpaired_drop(_number(before, metric), (value, stderr), each)
            )
        found.append(Accuracy(task, metric, value, stderr, drop, paired, _verdict(drop, allowed)))
        scores.append(pair)
    if len(tasks) > 1:
        found.append(_mean(first, other, found, scores, allowed, each))
    return found


def _mean(
    first: Contender,
    other: Contender,
    found: Sequence[Accuracy],
    scores: Sequence[list[list[float]]],
    allowed: float | None,
    confidence: float,
) -> Accuracy:
    value, stderr = _mean_of([(one.value, one.stderr) for one in found])
    drop, paired = None, all(one.paired for one in found)
    if other is not first:
        drop = (
            paired_drop([before for before, _ in scores], [after for _, after in scores], confidence)
            if paired
            else unpaired_drop(
                _mean_of([_number(first.tasks[one.task], one.metric) for one in found]), (value, stderr), confidence
            )
        )
    return Accuracy(MEAN, "", value, stderr, drop, paired, _verdict(drop, allowed))


def _mean_of(numbers: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    errors = [error for _, error in numbers if error is not None]
    value = math.fsum(value for value, _ in numbers) / len(numbers)
    return value, math.hypot(*errors) / len(numbers) if len(errors) == len(numbers) else None


def _number(result: dict[str, Any], metric: str) -> tuple[float, float | None]:
    found = result["metrics"][metric]
    return float(found["value"]), found["stderr"]


def _verdict(drop: Drop | None, allowed: float | None) -> str | None:
    return None if drop is None or allowed is None else judge(drop, allowed)


def _asked(result: dict[str, Any]) -> str:
    return f"{result['items']} items, {result['num_fewshot']} worked examples"
