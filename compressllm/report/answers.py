"""What the stages of a run found on tasks: accuracies in the order the model was changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressllm.eval.scores import accuracy_metric
from compressllm.report.section import Section, Table
from compressllm.report.wording import arrow, percent

#: Number of a stage, from 1, and its task results by name.
Asked = tuple[int, Mapping[str, Mapping[str, Any]]]


def answers_section(stages: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A row a task and metric, a column a stage that measured tasks; nothing if none did."""
    asked = asked_stages(stages)
    if not asked:
        return []
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for at, tasks in asked:
        for task, result in tasks.items():
            # Other items or other prompts are another row, so that nobody compares the two.
            how = f"{result['items']} items, {result['num_fewshot']} worked examples, {result['items_sha256'][:8]}"
            for metric, one in result["metrics"].items():
                rows.setdefault((task, metric, how), {})[at] = _with_error(one)
    header = ("task", "metric", "asked", *(f"stage {at}" for at, _ in asked))
    listed = [(*key, *(found.get(at, "—") for at, _ in asked)) for key, found in rows.items()]
    words = ["In percent, with the standard error. Stages measure the model as it was then."]
    return [Section("Accuracy on tasks", words, tables=[Table("Tasks", header, listed)])]


def answers_card(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The mean accuracy on the tasks the last measuring stage asked, after what it was when first asked the same."""
    asked = [tasks for _, tasks in asked_stages(stages)]
    if not asked:
        return []
    last = {task: result for task, result in asked[-1].items() if accuracy_metric(result)}
    if not last:
        return []
    first = next(tasks for tasks in asked if all(_same(tasks.get(task), result) for task, result in last.items()))
    before = percent(_mean(first, last)) if first is not asked[-1] else None
    title = f"Mean accuracy, {len(last)} tasks" if len(last) > 1 else f"Accuracy, {next(iter(last))}"
    return [(title, arrow(before, percent(_mean(last, last))))]


def asked_stages(stages: Sequence[Mapping[str, Any]]) -> list[Asked]:
    """The stages that measured tasks."""
    return [(at, stage["metrics"]["tasks"]) for at, stage in enumerate(stages, 1) if stage["metrics"].get("tasks")]


def _same(result: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    return result is not None and result["items_sha256"] == other["items_sha256"]


def _mean(tasks: Mapping[str, Mapping[str, Any]], names: Mapping[str, Mapping[str, Any]]) -> float:
    values = [float(tasks[task]["metrics"][accuracy_metric(names[task])]["value"]) for task in names]
    return sum(values) / len(values)


def _with_error(one: Mapping[str, Any]) -> str:
    error = "" if one["stderr"] is None else f" ± {100 * one['stderr']:.2f}"
    return f"{100 * one['value']:.2f}{error}"
