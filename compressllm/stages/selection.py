"""Choose records of a file into another one, with a report and pictures beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressllm.core.atomic import drop_scratch, write_atomically, write_json
from compressllm.core.errors import RunError
from compressllm.core.lock import Lock
from compressllm.core.run import Run, Track, untracked
from compressllm.models.bundle import open_bundle
from compressllm.models.shards import file_sha256
from compressllm.select.config import SelectConfig
from compressllm.select.layout import flat_map
from compressllm.select.records import read_records
from compressllm.select.selection import Selection, select_records
from compressllm.stages.environment import PeakMemory, environment
from compressllm.stages.selectionpictures import budget_svg, map_svg


def select_file(
    data: Path,
    out: Path,
    teacher: str,
    student: str | None,
    config: SelectConfig,
    *,
    seed: int = 0,
    show: Track = untracked,
    on_warning: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Choose records and return the report.

    Beside ``out``, say ``chosen.jsonl``, come ``chosen.report.json`` and, of a method that makes clusters,
    ``chosen.map.svg`` and ``chosen.budget.svg``. Each line of ``out`` is a record as it was in ``data``, with
    ``selection``: its line there, cluster, score, tokens and cost.

    Args:
        data: What `read_records` reads.
        out: A new file ending in ``.jsonl``.
        teacher: The dense model: anything `resolve_model` takes.
        student: The pruned model, likewise, or None if the method does not look at it.

    Raises: RunError if ``out`` cannot be written or another process writes to it; CompressError of the kind that fits.
    """
    if out.suffix != ".jsonl":
        raise RunError(f"{out}: the chosen records are written as .jsonl; give a file name that ends so")
    if not out.parent.is_dir():
        raise RunError(f"{out.parent}: is not a folder; make it first")
    try:
        lock = Lock(out.with_name(f".{out.name}.lock"), out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror}") from None
    with lock:
        if out.exists():
            raise RunError(f"{out}: is there already; remove it, or give a new file")
        drop_scratch(out.parent, out.stem)
        return _select(data, out, teacher, student, config, Run(seed=seed, show=show, on_warning=on_warning))


def _select(data: Path, out: Path, teacher: str, student: str | None, config: SelectConfig, run: Run) -> dict[str, Any]:
    begun, peak = time.perf_counter(), PeakMemory()
    dense, pruned = open_bundle(teacher), open_bundle(student) if student is not None else None
    records, faults = read_records(data)
    if faults.counts:
        run.warn(f"{data}: left out {faults}")
    selection = select_records(records, dense, pruned, config, run)
    report = {
        "schema": 1,
        "data": {"path": str(data), "sha256": file_sha256(data.expanduser()), "left_out": faults.as_json()},
        "teacher": teacher,
        "student": student,
        "seed": run.seed,
        "config": config.model_dump(mode="json"),
        **selection.report,
        "seconds": round(time.perf_counter() - begun, 3),
        "peak_memory_bytes": peak.bytes(),
        "warnings": run.warnings,
        "environment": environment(),
    }
    write_selection(selection, out, report, run.seed)
    return report


def write_selection(selection: Selection, out: Path, report: dict[str, Any], seed: int) -> None:
    """Write the chosen records to ``out``, say ``chosen.jsonl``, and report and pictures beside it.

    Of a method that makes clusters, ``report`` gets the map as well, ``{places, clusters}`` of some records.
    """
    if (drawn := _map(selection, seed)) is not None:
        report["map"] = drawn
        clusters = report["clusters"]
        write_atomically(out.with_suffix(".map.svg"), map_svg(drawn["places"], drawn["clusters"], clusters))
        write_atomically(out.with_suffix(".budget.svg"), budget_svg(clusters, report["budget"]))
    write_json(out.with_suffix(".report.json"), report)
    write_atomically(out, "".join(_lines(selection)))  # last: who finds it finds the rest


def _lines(selection: Selection) -> list[str]:
    chosen = selection.chosen
    lines = []
    for at, record in enumerate(selection.records):
        cluster = None if chosen.clusters is None else chosen.clusters[at]
        score, tokens = chosen.scores[at], selection.tokens[at]
        facts = {"line": record.line, "cluster": cluster, "score": score, "tokens": tokens, "cost": tokens**2}
        lines.append(json.dumps({**record.row, "selection": facts}, ensure_ascii=False) + "\n")
    return lines


def _map(selection: Selection, seed: int) -> dict[str, Any] | None:
    """Where some records are on a flat map, in [0, 1], and the cluster of each."""
    chosen = selection.chosen
    if chosen.labels is None or chosen.coordinates is None:
        return None
    drawn, places = flat_map(chosen.coordinates, seed)
    rounded = [[round(x, 4), round(y, 4)] for x, y in places.tolist()]
    return {"places": rounded, "clusters": chosen.labels[drawn].tolist()}
