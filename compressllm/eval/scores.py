"""What a harness found on a task, as it is kept: metrics with standard errors, and the score of every item."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final

#: Which accuracy a task is known by, if it has several: the length-normalised one where lm-eval gives it.
_MAIN: Final = ("acc_norm", "acc", "exact_match")


def task_result(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """One task of what lm-eval's `simple_evaluate` returns.

    Metrics are named as lm-eval does, with the filter behind a comma unless it is ``none``. ``scores`` has, for each
    metric that is 0 or 1 an item, those in the items' order; ``items_sha256`` is of prompts and targets, so two results
    with the same are of the same items asked in the same way.
    """
    values = found["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            metrics[_label(metric, filtered)] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            }
    samples = found["samples"][name]
    first = [one for one in samples if one["filter"] == samples[0]["filter"]]
    asked = "".join(one["prompt_hash"] + one["target_hash"] for one in first)
    scores: dict[str, list[float]] = {}
    for one in samples:
        for metric in one["metrics"]:
            scores.setdefault(_label(metric, one["filter"]), []).append(one[metric])
    return {
        "metrics": metrics,
        "items": len(first),
        "num_fewshot": found["n-shot"][name],
        "version": found["versions"].get(name),
        "items_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "scores": {
            metric: [int(score) for score in values]
            for metric, values in scores.items()
            if all(score in (0, 1) for score in values)
        },
    }


def pooled(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The tasks of a group as one, each item counting the same, as lm-eval pools MMLU.

    Standard errors are of the variance within the tasks: sum of ``(n - 1) n stderr^2`` over ``(N - k) N``.
    """
    found = list(parts.values())
    sizes = [one["items"] for one in found]
    total = sum(sizes)
    metrics = {}
    for metric in found[0]["metrics"]:
        numbers = [one["metrics"][metric] for one in found]
        value = sum(size * number["value"] for size, number in zip(sizes, numbers, strict=True)) / total
        within = sum(
            (size - 1) * size * (number["stderr"] or 0.0) ** 2 for size, number in zip(sizes, numbers, strict=True)
        )
        spare = (total - len(found)) * total
        metrics[metric] = {"value": value, "stderr": math.sqrt(within / spare) if spare else None}
    asked = "".join(one["items_sha256"] for one in found)
    return {
        "metrics": metrics,
        "items": total,
        "num_fewshot": found[0]["num_fewshot"],
        "version": found[0]["version"],
        "items_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "scores": {
            metric: [score for one in found for score in one["scores"][metric]]
            for metric in found[0]["scores"]
            if all(metric in one["scores"] for one in found)
        },
        "tasks": {name: {key: one[key] for key in ("metrics", "items")} for name, one in parts.items()},
    }


def accuracy_metric(result: Mapping[str, Any]) -> str | None:
    """The metric whose accuracy a task is known by: acc_norm, acc or exact_match; None if it has none of them."""
    metrics: list[str] = list(result["metrics"])
    return next((name for wanted in _MAIN for name in metrics if name.partition(",")[0] == wanted), None)


def _label(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"
