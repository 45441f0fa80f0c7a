"""Whether memory stays flat while a model trains, or generates, for an hour.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --minutes 60

Each workload is a process of its own: `recover` is one training of the tiny model, with moving masks, a teacher, and a
checkpoint and a look at the held-out text every few hundred steps; `generate` continues prompts, greedily and sampled,
on its packed 2:4 export. Its anonymous memory is read every half minute. After the first tenth, in which allocators and
caches fill, what the Theil-Sen slope adds up to over the rest must be less than one percent, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import combinations, count
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "soak.json"
TINY = HERE.parent / "tests" / "tiny"
PROMPTS = ("A list is ", "The statement ", "In Python, a generator is a function that ", "x")
MAY_GROW = 0.01  # over the whole time


class Enough(Exception):
    """The time is over."""


class Soak:
    """Counts iterations and samples resident memory.

    Args:
        seconds: How long to go on.
        every: Seconds between two samples.
    """

    def __init__(self, seconds: float, every: float) -> None:
        self._end, self._every = seconds, every
        self._begun = self._last = time.monotonic()
        self.iterations = 0
        self.samples: list[tuple[float, int, int]] = []
        """Seconds since the start, iterations so far, bytes of anonymous memory."""

    def tick(self) -> None:
        """One iteration is over. Raises Enough when the time is."""
        self.iterations += 1
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self.samples.append((round(now - self._begun, 1), self.iterations, anonymous_bytes()))
        if now - self._begun > self._end:
            raise Enough


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's: the kernel takes pages of files back when it likes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def prune_tiny(scratch: Path) -> Path:
    """The tiny model pruned to 2:4 and packed."""
    from compressllm.stages.recipe import make_recipe
    from compressllm.stages.runner import run_recipe

    calibration = {"source": str(TINY / "calibration.txt"), "samples": 8, "seqlen": 128}
    stages: list[Any] = [{"prune": {"pattern": "2:4", "calibration": calibration}}, {"export": {"format": "packed"}}]
    run_recipe(make_recipe({"model": str(TINY / "model"), "seed": 0, "stages": stages}), scratch / "pruned")
    return scratch / "pruned" / "model"


def soak_recover(soak: Soak, scratch: Path) -> None:
    """One training without end."""
    from compressllm.core.run import Label, Run
    from compressllm.models.bundle import open_bundle
    from compressllm.recover.config import RecoverConfig
    from compressllm.recover.model import recover_model

    def show(items: Iterable[Any], total: int, label: Label) -> Iterable[Any]:
        for item in items:
            yield item
            if total > 1000:  # the steps
                soak.tick()

    steps, tokens = 10_000_000, 128
    config = RecoverConfig(
        teacher=str(TINY / "model"),
        data=(str(TINY / "calibration.txt"),),
        seqlen=64,
        batch_tokens=tokens,
        micro_batch=1,
        max_tokens=steps * tokens,
        losses="kl=1.0,ce=0.1,squarehead=0.1",
        masking="ast",
        evaluate_every=500 / steps,
        save_every=300 / steps,
        lr=1e-5,
        diverged=1000.0,
    )
    (scratch / "recover").mkdir()
    recover_model(open_bundle(str(prune_tiny(scratch))), config, Run(folder=scratch / "recover", show=show))


def soak_generate(soak: Soak, scratch: Path) -> None:
    """One continuation after another."""
    from compressllm.eval.config import EvalConfig
    from compressllm.eval.generation import generate_text
    from compressllm.models.bundle import open_bundle
    from compressllm.stages.evaluate import prepare

    bundle = open_bundle(str(prune_tiny(scratch)))
    live, _ = prepare(bundle, EvalConfig(dtype="bfloat16"))
    for turn in count():
        prompt = PROMPTS[turn % len(PROMPTS)]
        generate_text(live, bundle.tokenizer, prompt, 16 + turn % 48, temperature=0.8 if turn % 2 else None, seed=turn)
        soak.tick()


WORKLOADS: dict[str, Callable[[Soak, Path], None]] = {"recover": soak_recover, "generate": soak_generate}


def growth(seconds: Sequence[float], sizes: Sequence[float]) -> float:
    """What the Theil-Sen slope adds up to over the time: the median of all slopes between two samples.

    A few samples that are far off, as when a checkpoint was just written, do not move it.
    """
    slopes = [(sizes[j] - sizes[i]) / (seconds[j] - seconds[i]) for i, j in combinations(range(len(sizes)), 2)]
    return statistics.median(slopes) * (seconds[-1] - seconds[0])


def verdict(seconds: Sequence[float], sizes: Sequence[float]) -> dict[str, Any]:
    """Whether memory was flat after the first tenth of the time."""
    warm = [(at, size) for at, size in zip(seconds, sizes, strict=True) if at >= seconds[-1] / 10]
    if len(warm) < 8:
        raise SystemExit(f"only {len(warm)} samples after the first tenth; run longer, or sample more often")
    at, kept = zip(*warm, strict=True)
    middle, grown = statistics.median(kept), growth(at, kept)
    return {"median_bytes": int(middle), "growth_bytes": round(grown), "flat": grown < MAY_GROW * middle}


def child(name: str, seconds: float, every: float) -> None:
    """Run one workload here, and print what was sampled."""
    import torch
    from transformers.utils import logging

    from compressllm.stages.environment import environment

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    soak = Soak(seconds, every)
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Enough):
        WORKLOADS[name](soak, Path(scratch))
    print(json.dumps({"iterations": soak.iterations, "samples": soak.samples, "environment": environment()}))


def main() -> None:
    """Soak each workload and write what was found. Exits with 1 if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="recover,generate", help="recover, generate or both, one after the other")
    parser.add_argument("--minutes", type=float, default=60.0, help="of each")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two samples")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.minutes * 60, options.every)

    flat = True
    for name in options.what.split(","):
        command = [sys.executable, __file__, "--child", name, "--minutes", str(options.minutes)]
        done = subprocess.run([*command, "--every", str(options.every)], stdout=subprocess.PIPE, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        at, iterations, sizes = zip(*told["samples"], strict=True)
        found = verdict(at, sizes)
        flat = flat and found["flat"]
        row = {"what": name, "minutes": options.minutes, "iterations": told["iterations"], **found}
        row |= {"seconds": at, "iterations_then": iterations, "anonymous_bytes": sizes}
        row |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": told["environment"]}
        record = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
        record["command"] = "OMP_NUM_THREADS=1 python benchmarks/soak.py --minutes MINUTES"
        record["results"] = [one for one in record["results"] if one["what"] != name] + [row]
        options.out.write_text(json.dumps(record) + "\n")
        print(f"{name}: {row['iterations']} iterations, {found}", flush=True)
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
