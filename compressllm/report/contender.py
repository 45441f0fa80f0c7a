"""What is compared: a run, or a measurement in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressllm.core.errors import FormatError
from compressllm.report.record import read_run


@dataclass(frozen=True)
class Contender:
    """One of what is compared.

    Args:
        name: As it was given.
        measured: Perplexities and how they were measured, in order.
        facts: Of a run: sparsity, bytes, seconds and peak memory; empty of a measurement alone.
        tasks: Task -> its result, the last where one was measured twice.
    """

    name: str
    measured: list[dict[str, Any]]
    facts: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


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
        return _contender(name, metrics, facts)
    try:
        found = json.loads(path.read_text())
        measured = found.get("measurements", [found])
        if not all(float(one["perplexity"]) > 0 for one in measured if "tasks" not in one or "perplexity" in one):
            raise ValueError("a perplexity is not positive")
        return _contender(name, measured, {})
    except OSError as error:
        raise FormatError(f"{name}: cannot be read: {error.strerror}; give a run folder or a JSON file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{name}: holds no perplexity ({error}); make it with compressllm eval --json") from None


def _contender(name: str, measured: list[dict[str, Any]], facts: dict[str, Any]) -> Contender:
    tasks = {task: result for one in measured for task, result in one.get("tasks", {}).items()}
    return Contender(name, [one for one in measured if "perplexity" in one], facts, tasks)
