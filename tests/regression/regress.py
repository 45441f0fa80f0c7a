"""Hold perplexities against the committed baselines, with the command a user's CI would run.

The tiny model's order (dense < admm < sparsegpt < wanda < magnitude < random) is held as well as its numbers.
``--write`` measures the baselines anew; a line in CHANGELOG.md goes with every one that moves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE.parent / "tiny"
EVAL, CALIBRATION = TINY / "eval.txt", TINY / "calibration.txt"
# Two correct codes differ by about 3 % at 2:4 on the demo model, whose masks turn on the last bits of its
# statistics; the tiny model in float32 and the dense models do not.
TOLERANCE = {"tiny": "1%", "demo-dense": "1%", "demo": "4%"}


def compressllm(*arguments: str | Path) -> tuple[int, str]:
    """Run the command line; its exit code and what it printed."""
    command = [sys.executable, "-m", "compressllm", *map(str, arguments)]
    steady = {**os.environ, "COMPRESSLLM_MEASURE": "0"}  # a backend that is chosen by rank is the same in every run
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=steady)
    return done.returncode, done.stdout


def measure(name: str, model: str | Path, seqlen: int, write: bool) -> float | None:
    """Perplexity of ``model``, or None if it fails its gate."""
    baseline = HERE / "baselines" / f"{name}.json"
    tolerance = TOLERANCE.get(name) or TOLERANCE[name.split("-")[0]]
    gate = ["--write-baseline", baseline] if write else ["--baseline", baseline, "--max-increase", tolerance]
    options = ["--data", EVAL.relative_to(Path.cwd()), "--seqlen", str(seqlen), "--dtype", "float32", "--json"]
    print(f"== {name}", flush=True)
    code, text = compressllm("eval", model, *options, *gate)
    return json.loads(text)["perplexity"] if code == 0 else None


def main() -> int:
    """Run every case; 0 if all gates passed and the order held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="measure the baselines anew")
    write = parser.parse_args().write
    failed = []
    found: dict[str, float] = {}

    def case(name: str, model: str | Path, seqlen: int) -> None:
        value = measure(name, model, seqlen, write)
        if value is None:
            failed.append(name)
        else:
            found[name] = value

    with tempfile.TemporaryDirectory() as scratch:
        for family, model, seqlen, methods in (
            ("tiny", TINY / "model", 256, ("admm", "sparsegpt", "wanda", "magnitude", "random")),
            ("demo", "demo", 512, ("wanda",)),
        ):
            case(f"{family}-dense", model, seqlen)
            for method in methods:
                name, out = f"{family}-{method}-2of4", Path(scratch) / f"{family}-{method}"
                calibration = ["--data", CALIBRATION, "--samples", "16", "--seqlen", str(seqlen), "--dtype", "float32"]
                code, _ = compressllm("prune", model, out, "--method", method, "--pattern", "2:4", *calibration)
                packed = Path(scratch) / f"{name}-packed"
                if code == 0:
                    code, _ = compressllm("export", out, packed)
                if code == 0:
                    case(name, packed, seqlen)
                else:
                    failed.append(name)

    order = ["tiny-dense", *(f"tiny-{method}-2of4" for method in ("admm", "sparsegpt", "wanda", "magnitude", "random"))]
    values = [found.get(name, float("nan")) for name in order]
    if not all(low < high for low, high in itertools.pairwise(values)):
        failed.append("order of the tiny model: " + " < ".join(order))
    for name, value in found.items():
        print(f"{name:24} {value:10.4f}")
    print(f"{len(found)} passed, {len(failed)} failed")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
