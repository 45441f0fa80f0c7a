"""Pruning speed and peak memory, ours and, if it is at hand, the Wanda authors' own code.

Every measurement is a process of its own on the same model, token ids and dtype, the two codes in turn. Ours is the
command a user types: it reads the checkpoint, prunes it, writes the result and hashes it. The authors' code is given
its model in memory, and its time counts from the first line of its pruning function to the last; its whole process
(imports, loading, saving the model) is given too, so that like can be compared with like.

    python benchmarks/prune_speed.py --reference WANDA --reference-python ENV/bin/python
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compressllm.calibration.windows import load_windows
from compressllm.models.bundle import open_bundle
from compressllm.stages.environment import environment

HERE = Path(__file__).parent


def run_process(command: list[str]) -> tuple[float, int, str]:
    """Wall seconds, peak resident bytes and stdout of a process."""
    timed = ["/usr/bin/env", "python3", "-c", _WATCH, *command]
    begun = time.perf_counter()
    done = subprocess.run(timed, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    out, _, peak = done.stdout.rstrip().rpartition("\n")
    return seconds, int(peak), out


# A process cannot see its children's peak memory one by one, so each is run by a small parent of its own.
_WATCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, flush=True)
sys.exit(code)
"""


def ours(model: Path, ids: Path, method: str, scratch: Path) -> dict[str, Any]:
    """One run of our command."""
    out = scratch / "ours"
    command = [sys.executable, "-m", "compressllm", "prune", str(model), str(out), "--method", method]
    seconds, peak, text = run_process([*command, "--data", str(ids), "--json"])
    stage = json.loads(text)["stages"][0]
    masks = stage["metrics"]["masks_sha256"]
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return {"prune_seconds": stage["seconds"], "process_seconds": seconds, "peak_bytes": peak, "masks": masks}


def reference(
    model: Path, ids: Path, method: str, scratch: Path, options: argparse.Namespace, dtype: str
) -> dict[str, Any]:
    """One run of the authors' code, which saves its model too."""
    result, saved = scratch / "reference.json", scratch / "reference"
    command = [options.reference_python, str(HERE / "reference.py"), "--repo", str(options.reference)]
    command += ["--model", str(model), "--ids", str(ids), "--method", method, "--dtype", dtype]
    seconds, peak, _ = run_process([*command, "--out", str(result), "--save-model", str(saved)])
    facts = json.loads(result.read_text())
    subprocess.run(["rm", "-rf", str(saved)], check=True)
    return {"prune_seconds": facts["prune_seconds"], "process_seconds": seconds, "peak_bytes": peak, "facts": facts}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of each figure."""
    figures = {}
    for key in ("prune_seconds", "process_seconds", "peak_bytes"):
        values = [run[key] for run in runs]
        figures[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return figures


def _compare(results: dict[str, Any], name: str) -> None:
    """Add how many times faster we are, and what share of the memory we take, by medians."""
    other, mine = results[name], results["ours"]
    other["times_slower"] = {
        key: round(other[key]["median"] / mine[key]["median"], 3) for key in ("prune_seconds", "process_seconds")
    }
    other["times_memory"] = round(other["peak_bytes"]["median"] / mine["peak_bytes"]["median"], 3)


def _nameless(argument: str) -> str:
    """An argument as it is quoted: paths are this machine's affair."""
    return Path(argument).name.upper() if "/" in argument else argument


def _commit(clone: Path) -> str:
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="anything compressllm takes")
    parser.add_argument("--windows", default="64x512", help="calibration windows x tokens, of the builtin text")
    parser.add_argument("--ids", type=Path, help=".npy of token ids to use in their place")
    parser.add_argument("--methods", default="magnitude,wanda")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--reference", type=Path, help="clone of the Wanda authors' repository")
    parser.add_argument("--reference-python", default=sys.executable, help="python of an environment it runs in")
    parser.add_argument("--reference-dtypes", default="bfloat16", help="comma-separated dtypes to run it in")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prune_speed.json")
    options = parser.parse_args()

    bundle = open_bundle(options.model)
    if bundle.checkpoint is None:
        sys.exit("the model has no folder")
    results: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        ids = options.ids
        if ids is None:
            count, length = map(int, options.windows.split("x"))
            ids = scratch / "ids.npy"
            np.save(ids, load_windows("builtin", bundle.tokenizer, count, length).ids.numpy())
        dtypes = options.reference_dtypes.split(",") if options.reference else []
        for method in options.methods.split(","):
            runs: dict[str, list[dict[str, Any]]] = {}
            for _ in range(options.runs):
                runs.setdefault("ours", []).append(ours(bundle.checkpoint.folder, ids, method, scratch))
                for dtype in dtypes:
                    made = reference(bundle.checkpoint.folder, ids, method, scratch, options, dtype)
                    runs.setdefault(f"reference {dtype}", []).append(made)
            results[method] = {name: summary(made) for name, made in runs.items()}
            for name, made in runs.items():
                if name != "ours":
                    versions = made[0]["facts"]["versions"]
                    _compare(results[method], name)
            results[method]["ours"]["masks_sha256"] = sorted({run["masks"] for run in runs["ours"]})
            for name, figures in results[method].items():
                line = ", ".join(
                    f"{key.removesuffix('_seconds')} {figures[key]['median']:.1f} s"
                    for key in ("prune_seconds", "process_seconds")
                )
                print(f"{method:10} {name:20} {line}, peak {figures['peak_bytes']['median'] / 1e6:.0f} MB", flush=True)
        shape = list(np.load(ids, mmap_mode="r").shape)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "what": "pruning to 2:4: wall clock and peak memory",
        "command": " ".join(["python benchmarks/prune_speed.py", *map(_nameless, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": options.model,
        "windows": shape,
        "runs": options.runs,
        "environment": environment(),
        "reference": versions | {"commit": _commit(options.reference)} if versions else None,
        "results": results,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
