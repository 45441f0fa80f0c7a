"""Kill runs of every stage at random places, go on, and compare with a run that nobody disturbed, byte by byte.

    OMP_NUM_THREADS=1 python benchmarks/kill_matrix.py --points 8

A place is a call that changes a file, half way through it too, drawn from all that an undisturbed run makes; or a
moment of the time it takes. Half the runs get SIGKILL, a quarter each SIGTERM and SIGINT; every third one is killed
again while it goes on. `--processes` does some more with real processes instead of forked ones, which is slow. Rows
that the result file has are not made again. The exit code is 1 if any run came out otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from faults import Point, die
from workloads import SIGNALS, Workloads, clean_end, differing, fingerprint, half_written

from compressllm.stages.environment import environment

HERE = Path(__file__).parent
RESULT = HERE / "results" / "kill_matrix.json"
TINY = HERE.parent / "tests" / "tiny"
Row = dict[str, Any]


class Matrix:
    """Kills one workload after another and checks what becomes of it."""

    def __init__(self, scratch: Path, seed: int) -> None:
        (scratch / "start").mkdir()
        self.workloads = Workloads(scratch / "start", TINY / "model", TINY / "calibration.txt")
        self._scratch, self._seed = scratch, seed
        self._whole: dict[str, tuple[dict[str, str], list[Point], float]] = {}

    def undisturbed(self, name: str) -> tuple[dict[str, str], list[Point], float]:
        """What a run leaves, where it changes files, and how long it takes."""
        if name not in self._whole:
            base, points = self.new(), self._scratch / "points"
            with points.open("w") as file:
                ended = self.workloads.run(name, base, lambda _, point: print(json.dumps(point), file=file, flush=True))
            if ended.code:
                raise RuntimeError(f"{name}: {ended.err}")
            seen = [Point(*json.loads(line)) for line in points.read_text().splitlines()]
            self._whole[name] = fingerprint(base / "out"), seen, ended.seconds
        return self._whole[name]

    def kill(self, name: str, number: int) -> Row:
        """Kill a run for the ``number``-th time, go on, and compare."""
        chance = random.Random(f"{self._seed} {name} {number}")
        wanted, points, seconds = self.undisturbed(name)
        kind = ("SIGKILL", "SIGTERM", "SIGKILL", "SIGINT")[number % 4]
        base, faults = self.new(), []
        row: Row = {"workload": name, "number": number, "signal": kind}
        kills = 2 if number % 3 == 0 else 1
        for at in range(kills):
            if kind == "SIGKILL" and chance.random() < 0.25:
                place: Any = round(chance.uniform(0, seconds), 3)
                ended = self.workloads.run(name, base, kill_after=place)
                row[f"place_{at + 1}"] = f"after {place} of {seconds:.3f} s"
                if ended.code == 0:
                    continue  # it was over already
            else:
                index = chance.randrange(len(points) // (1 + 2 * at))
                ended = self.workloads.run(name, base, die(index, SIGNALS[kind][0]))
                point = points[index]
                row[f"place_{at + 1}"] = f"{index} of {len(points)}" + (
                    f": {point.call}{' half way' if point.half else ''} {point.path}" if at == 0 else ""
                )
                if at and ended.code == 0:
                    continue  # going on made fewer calls
            faults += [clean_end(kind, ended), *half_written(base / "out")]
        done = self.workloads.run(name, base)
        if done.code:
            faults.append(f"going on: exit code {done.code}: {done.err[-1000:]}")
        else:
            faults += [f"differs: {path}" for path in differing(wanted, fingerprint(base / "out"))]
        shutil.rmtree(base)
        return row | {"wrong": [fault for fault in faults if fault]}

    def kill_process(self, name: str, number: int) -> Row:
        """The same with a real process, killed after a random time."""
        chance = random.Random(f"{self._seed} process {name} {number}")
        base = self.new()
        command = [sys.executable, "-m", *self.workloads.command(name, base / "out")]
        begun = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        seconds, wanted = time.monotonic() - begun, fingerprint(base / "out")
        base = self.new()
        command = [sys.executable, "-m", *self.workloads.command(name, base / "out")]
        place, kind = round(chance.uniform(0.3, 1) * seconds, 2), ("SIGKILL", "SIGTERM")[number % 2]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(place)
        process.send_signal(SIGNALS[kind][0])
        code = process.wait()
        if code or name != "select":  # whose output, once it is whole, is not written over
            subprocess.run(command, check=True, capture_output=True)
        wrong = [f"differs: {path}" for path in differing(wanted, fingerprint(base / "out"))]
        if code not in {0, SIGNALS[kind][1], -SIGNALS[kind][0]}:  # it may not have listened yet, or be over
            wrong.append(f"exit code {code}")
        row = {"workload": name, "number": number, "signal": kind, "process": True}
        return row | {"place_1": f"after {place} of {seconds:.1f} s", "exit": code, "wrong": wrong}

    def new(self) -> Path:
        """An empty folder for a run."""
        base = self._scratch / "run"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        return base


def main() -> None:
    """Make the rows that are missing, print each, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=8, help="of each workload")
    parser.add_argument("--processes", type=int, default=0, help="real processes, of each workload")
    parser.add_argument("--workloads", default="", help="comma list; all unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: Row = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    have = {(row["workload"], row["number"], row.get("process", False)) for row in record["results"]}
    with tempfile.TemporaryDirectory() as scratch:
        matrix = Matrix(Path(scratch), options.seed)
        names = options.workloads.split(",") if options.workloads else matrix.workloads.names
        keys = [(name, number, False) for number in range(options.points) for name in names]
        keys += [(name, number, True) for number in range(options.processes) for name in names]
        for name, number, process in keys:
            if (name, number, process) in have:
                continue
            row = matrix.kill_process(name, number) if process else matrix.kill(name, number)
            told = row["wrong"] or "the same"
            print(f"{name:12} {number:2} {row['signal']} {row.get('place_1', '')}: {told}", flush=True)
            record["results"].append(row | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
            record["killed"] = len(record["results"])
            record["came_out_otherwise"] = sum(bool(one["wrong"]) for one in record["results"])
            record |= {"seed": options.seed, "environment": environment()}
            record["command"] = "OMP_NUM_THREADS=1 python benchmarks/kill_matrix.py --points N --processes M"
            options.out.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(1 if record["came_out_otherwise"] else 0)


if __name__ == "__main__":
    main()
