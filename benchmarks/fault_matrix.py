"""Make the disk fail at every place where a run changes a file: the run must say so, and go on once it is mended.

    OMP_NUM_THREADS=1 python benchmarks/fault_matrix.py            # each kind of place: its first and its last
    OMP_NUM_THREADS=1 python benchmarks/fault_matrix.py --every    # each single one

Four faults: from that place on the disk is full (`full`), or read-only (`read_only`); that one call fails with an I/O
error (`failing`); the output folder is moved away there (`vanished`). Each time the exit code must be 2 and the error
one line, nothing half-written may be under a final name, and the same command, once the fault is gone, must lead to
what an undisturbed run leaves, byte by byte. Rows that the result file has are not made again. The exit code is 1 if
anything was otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from faults import Point, Visit, failing, full, read_only, vanished
from kill_matrix import Matrix
from workloads import clean_refusal, differing, fingerprint, half_written

from compressllm.stages.environment import environment

HERE = Path(__file__).parent
RESULT = HERE / "results" / "fault_matrix.json"
KINDS = ("full", "read_only", "failing", "vanished")


def kind_of(point: Point) -> tuple[str, bool, str]:
    """What makes places alike: the call, and the file but for numbers and random letters in its name."""
    path = re.sub(r"-[a-z0-9_]{8}\.scratch", ".scratch", point.path)
    return point.call, point.half, re.sub(r"\d+", "N", path)


def places(points: Sequence[Point], every: bool = False, most: int | None = None) -> list[int]:
    """Which places to try; of more than ``most``, those spread evenly."""
    if most is not None:
        found = places(points, every)
        return sorted({found[(2 * at + 1) * len(found) // (2 * most)] for at in range(most)})
    if every:
        return list(range(len(points)))
    kinds: dict[tuple[str, bool, str], list[int]] = {}
    for index, point in enumerate(points):
        kinds.setdefault(kind_of(point), []).append(index)
    return sorted({index for found in kinds.values() for index in (found[0], found[-1])})


def fault(kind: str, place: int, base: Path) -> Visit:
    """The visitor that makes it."""
    if kind == "vanished":
        return vanished(place, base / "out", base / "away")
    return {"full": full, "read_only": read_only, "failing": failing}[kind](place)


def try_place(matrix: Matrix, name: str, kind: str, place: int) -> list[str]:
    """What is wrong with how a run with this fault ended, and with what it came to after it."""
    wanted, points, _ = matrix.undisturbed(name)
    base, where = matrix.new(), f"{place} {points[place].call} {points[place].path}"
    ended = matrix.workloads.run(name, base, fault(kind, place, base))
    if (base / "away").exists():
        shutil.rmtree(base / "out", ignore_errors=True)
        (base / "away").rename(base / "out")
    wrong = []
    if ended.code != 0:  # it may do without: a lock's text, a cache
        wrong += [clean_refusal(ended), *half_written(base / "out")]
    again = matrix.workloads.run(name, base) if ended.code or name != "select" else ended
    if again.code:
        wrong.append(f"going on: exit code {again.code}: {again.err[-1000:]}")
    else:
        wrong += [f"differs: {path}" for path in differing(wanted, fingerprint(base / "out"))]
    return [f"{where}: {one}" for one in wrong if one]


def main() -> None:
    """Make the rows that are missing, print each, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--most", type=int, help="of these at most so many, spread evenly")
    parser.add_argument("--workloads", default="", help="comma list; all unless given")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    have = {(row["workload"], row["fault"], row["every"], row["most"]) for row in record["results"]}
    with tempfile.TemporaryDirectory() as scratch:
        matrix = Matrix(Path(scratch), seed=0)
        names = options.workloads.split(",") if options.workloads else matrix.workloads.names
        for kind in options.kinds.split(","):
            for name in names:
                if (name, kind, options.every, options.most) in have:
                    continue
                points = matrix.undisturbed(name)[1]
                tried = places(points, options.every, options.most)
                wrong = [line for place in tried for line in try_place(matrix, name, kind, place)]
                print(f"{name:12} {kind:10} {len(tried)} of {len(points)} places: {wrong or 'all well'}", flush=True)
                row = {"workload": name, "fault": kind, "every": options.every, "most": options.most}
                row |= {
                    "tried": len(tried),
                    "places": len(points),
                    "wrong": wrong,
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                }
                record["results"].append(row)
                record |= {"environment": environment(), "command": "python benchmarks/fault_matrix.py"}
                options.out.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(1 if any(row["wrong"] for row in record["results"]) else 0)


if __name__ == "__main__":
    main()
