"""Heat maps of what each linear lost, and a table of every linear."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from compressllm.report.picture import heat_svg
from compressllm.report.section import Picture, Section, Table
from compressllm.report.wording import number, stage_title

#: Field of a linear's row -> what its map is called.
_MAPS = {
    "sparsity": "Sparsity",
    "error": "Relative output error",
    "reconstruct_after": "Output error after reconstruction",
}


def layer_sections(stages: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A section for each stage that tells of linears."""
    return [_section(number, stage) for number, stage in enumerate(stages, 1) if _rows(stage)]


def _rows(stage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in stage["linears"] if "linear" in row]


def _section(place: int, stage: Mapping[str, Any]) -> Section:
    rows = _rows(stage)
    pictures = []
    for field, title in _MAPS.items():
        if cells := heat_cells({row["linear"]: row.get(field) for row in rows}):
            pictures.append(Picture(heat_svg(cells, title)))
    if cells := heat_cells({f"{name}.whole block": took for name, took in stage.get("block_seconds", {}).items()}):
        pictures.append(Picture(heat_svg(cells, "Seconds")))
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "linear"]
    table = Table(
        f"Every linear of stage {place} ({len(rows)})",
        ("linear", *(key.replace("_", " ") for key in keys)),
        [(row["linear"], *(number(row.get(key)) for key in keys)) for row in rows],
        folded=True,
    )
    times = Table(
        f"Seconds of each block in stage {place}",
        ("block", "seconds"),
        [(name, number(took)) for name, took in stage.get("block_seconds", {}).items()],
        folded=True,
    )
    words = ["Errors are squared output errors over squared outputs, on the calibration text."] if pictures else []
    tables = [table, times] if times.rows else [table]
    return Section(f"Layers, stage {place}: {stage_title(stage)}", words, pictures=pictures, tables=tables)


def heat_cells(values: Mapping[str, Any]) -> dict[tuple[int, str], float]:
    """Linear name -> value as (block, kind) -> mean value; the experts of a block are one kind.

    What is no finite number is left out, and so is a name without a block's number.
    """
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for name, value in values.items():
        match = re.match(r".*?\.(\d+)\.(.+)$", name)
        if match and isinstance(value, int | float) and math.isfinite(value):
            found[int(match[1]), re.sub(r"\.\d+\.", ".*.", match[2])].append(float(value))
    short = _short({kind for _, kind in found})
    return {(block, short[kind]): math.fsum(many) / len(many) for (block, kind), many in found.items()}


def _short(kinds: set[str]) -> dict[str, str]:
    """Each kind's last word, unless two share it."""
    last = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    counted = list(last.values())
    return {kind: word if counted.count(word) == 1 else kind for kind, word in last.items()}
