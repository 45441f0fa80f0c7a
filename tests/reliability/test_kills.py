"""Runs that are killed while they change files: a few of what benchmarks/kill_matrix.py does."""

from typing import Any

import pytest
from faults import Point, die
from workloads import SIGNALS, clean_end, differing, fingerprint, half_written

#: Workload, signal, and the call it comes in: the last of its kind, half way where that can be.
CALLS = [
    ("wanda", "SIGKILL", "replace", "out/01-prune/progress.json"),
    ("recover", "SIGKILL", "unlink", "out/01-recover/progress.json"),
    ("quantize", "SIGINT", "pwrite", "out/01-quantize/model.partial/model.packed.safetensors"),
    ("export", "SIGKILL", "replace", "out/01-export/model"),
    ("select", "SIGTERM", "replace", "out/chosen.jsonl"),
]


def place(points: list[Point], call: str, path: str) -> int:
    found = [index for index, point in enumerate(points) if (point.call, point.path) == (call, path)]
    assert found, f"no {call} of {path} among {sorted({point.path for point in points})}"
    return found[-1]


@pytest.mark.parametrize(("name", "kind", "call", "path"), CALLS)
def test_a_killed_run_goes_on_to_the_same_bytes(matrix: Any, name: str, kind: str, call: str, path: str) -> None:
    wanted, points, _ = matrix.undisturbed(name)
    base = matrix.new()
    ended = matrix.workloads.run(name, base, die(place(points, call, path), SIGNALS[kind][0]))
    assert clean_end(kind, ended) is None
    assert half_written(base / "out") == []
    again = matrix.workloads.run(name, base)
    assert again.code == 0, again.err
    assert differing(wanted, fingerprint(base / "out")) == []


@pytest.mark.parametrize("path", ["out/manifest.json", "out/recipe.yaml"])
def test_killed_while_the_run_folder_is_made(matrix: Any, path: str) -> None:
    wanted, points, _ = matrix.undisturbed("wanda")
    first = next(index for index, point in enumerate(points) if (point.call, point.path) == ("replace", path))
    base = matrix.new()
    assert matrix.workloads.run("wanda", base, die(first)).code == -9
    again = matrix.workloads.run("wanda", base)
    assert again.code == 0, again.err
    assert differing(wanted, fingerprint(base / "out")) == []
