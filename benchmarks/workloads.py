"""Small runs of every stage, each in a forked child that can be made to fail or die, and what came of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
import yaml
from faults import Visit, visited

from compressllm.cli import app as cli
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.shards import ShardWriter

#: What differs between two runs of the same: times, memory, and how the work was cut up.
VOLATILE = frozenset(
    {"seconds", "begun", "finished", "environment", "block_seconds", "peak_memory_bytes", "training_seconds"}
    | {"estimated_memory_bytes"}
    | {"tokens_per_second", "resumed_at_block", "threads"}
)


class Ended(NamedTuple):
    """How a child ended: its exit code, or minus the signal that killed it; what it said; seconds."""

    code: int
    err: str
    seconds: float


class Workloads:
    """Recipes, one a stage, on one small model; ``command(name, out)`` is what a user would type.

    Args:
        scratch: Existing folder for what they start from.
        model: A dense model's folder, of which the first two blocks are taken.
        text: A text file.
    """

    def __init__(self, scratch: Path, model: Path, text: Path, seqlen: int = 64) -> None:
        self.scratch, self._model = scratch, str(scratch / "dense")
        _cut(model, scratch / "dense", blocks=2)
        look = {"source": str(text), "samples": 4, "seqlen": seqlen}
        pruned = str(scratch / "pruned" / "model")
        recover = {
            "teacher": self._model, "data": [str(text)], "seqlen": seqlen, "batch_tokens": 2 * seqlen,
            "max_tokens": 16 * seqlen, "micro_batch": 1, "masking": "ast", "refresh": 2, "evaluate_every": 0.25,
            "save_every": 0.25, "lr": 0.001, "teacher_cache": 8,
        }  # fmt: skip
        admm = {"admm": {"stages": 2, "refit_steps": 2}}
        _command()
        self.recipes: dict[str, list[dict[str, Any]]] = {
            "wanda": [{"prune": {"method": "wanda", "calibration": look}}],
            "sparsegpt": [{"prune": {"method": "sparsegpt", "calibration": look, "order": "sequential"}}],
            "admm": [{"prune": {"method": admm, "pattern": "0.5", "allocation": "owl", "calibration": look}}],
            "reconstruct": [{"prune": {"method": "wanda", "calibration": look, "reconstruct": {"epochs": 1}}}],
            "recover": [{"recover": recover}],
            "quantize": [{"quantize": {"scheme": "int8", "calibration": look}}],
            "export": [{"export": {"format": "packed"}}],
            "whole": [
                {"permute": {"score": "magnitude", "rounds": 2}},
                {"prune": {"method": "magnitude"}},
                {"quantize": {"method": "rtn"}},
                {"eval": {"source": str(text), "seqlen": seqlen, "windows": 2, "backend": "dense"}},
            ],
        }
        self._start = {"recover": pruned, "quantize": pruned, "export": pruned}
        self.names = [*self.recipes, "select"]
        for name, stages in self.recipes.items():
            recipe = {"model": self._start.get(name, self._model), "seed": 3, "stages": stages}
            (scratch / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        rows = [{"instruction": f"Say {one} again.", "output": "so " * (1 + one % 5)} for one in range(24)]
        (scratch / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = self.run("wanda", scratch, out=scratch / "pruned")
        if made.code:
            raise RuntimeError(made.err)

    def command(self, name: str, out: Path) -> list[str]:
        """The command line."""
        if name != "select":
            return ["compressllm", "run", str(self.scratch / f"{name}.yaml"), str(out)]
        out.mkdir(parents=True, exist_ok=True)  # its output is a file, whose folder must be there
        pruned = str(self.scratch / "pruned")
        options = ["--teacher", self._model, "--student", pruned, "--method", "kd-gap", "--max-tokens", "32"]
        return ["compressllm", "select", str(self.scratch / "records.jsonl"), str(out / "chosen.jsonl"), *options]

    def run(
        self,
        name: str,
        base: Path,
        visit: Visit | None = None,
        kill_after: float | None = None,
        out: Path | None = None,
    ) -> Ended:
        """Run a workload into ``base / "out"``; the rest is as `forked` has it."""
        return forked(self.command(name, out or base / "out"), base, visit, kill_after)


@functools.cache
def _command() -> Any:
    """The command line, which takes a while to make and is the same in every child."""
    return typer.main.get_command(cli.app)


def _cut(model: Path, to: Path, blocks: int) -> None:
    """The first blocks of a model, as a model of their own."""
    source = Checkpoint(model)
    to.mkdir()
    source.copy_side_files(to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    left = [f"model.layers.{index}." for index in range(blocks, config["num_hidden_layers"])]
    layout = {name: spec for name, spec in source.specs.items() if not name.startswith(tuple(left))}
    writer = ShardWriter(to, layout)
    for name in layout:
        writer.write(name, source.read(name))
    writer.finish()


def forked(command: list[str], base: Path, visit: Visit | None = None, kill_after: float | None = None) -> Ended:
    """Run the command line in a forked child, which is spared the start of Python and torch.

    Args:
        base: The cache is in it, and what is changed below it is visited.
        kill_after: Seconds after which the child is killed, wherever it is.
    """
    log, begun = base.parent / f".{base.name}.log", time.monotonic()
    started: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            code = 70
            with contextlib.suppress(BaseException):
                code = _in_child(command, base, visit, log)
            os._exit(code)
        started.append(child)

    # From a thread of its own: OpenMP's threads belong to the one that used them, and its child would wait for them.
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    child = started[0]
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
    status = os.waitpid(child, 0)[1]
    err = log.read_text()
    log.unlink()
    return Ended(os.waitstatus_to_exitcode(status), err, time.monotonic() - begun)


def _in_child(command: list[str], base: Path, visit: Visit | None, log: Path) -> int:
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115 (the child's, to its end)
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ["COMPRESSLLM_CACHE"] = str(base / "cache")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    sys.argv = command
    cli.app = _command()
    try:
        with visited(base, visit) if visit else contextlib.nullcontext():
            cli.main()
    except SystemExit as exit:
        return int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fingerprint(out: Path) -> dict[str, str]:
    """Path -> hash of everything a run left, times left out; what is hidden too, since nothing hidden may stay."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir():
            found[str(path.relative_to(out))] = "folder"
            continue
        content = path.read_bytes()
        if path.name in {"manifest.json", "chosen.report.json"}:
            content = json.dumps(_steady(json.loads(content)), sort_keys=True).encode()
        elif path.name == "metrics.jsonl":
            content = json.dumps([_steady(json.loads(line)) for line in content.splitlines()]).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """What two fingerprints do not agree on."""
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def half_written(out: Path) -> list[str]:
    """Files under their final names that are not whole: JSON that does not parse, weights without their hash."""
    wrong = []
    for path in out.rglob("*"):
        hidden = any(part.startswith(".") or part.endswith(".partial") for part in path.relative_to(out).parts)
        if hidden or path.is_dir():
            continue
        if path.suffix == ".json":
            try:
                json.loads(path.read_text())
            except ValueError:
                wrong.append(str(path))
        if path.name == "compressllm.json" and path.stat().st_size:
            for name, digest in json.loads(path.read_text())["sha256"].items():
                if hashlib.sha256((path.parent / name).read_bytes()).hexdigest() != digest:
                    wrong.append(str(path.parent / name))
    models = [path for path in out.rglob("model") if path.is_dir()]
    return wrong + [str(one) for one in models if not (one / "compressllm.json").exists()]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(each) for key, each in value.items() if key not in VOLATILE}
    return [_steady(each) for each in value] if isinstance(value, list) else value


#: Signal -> the exit code it must lead to.
SIGNALS: dict[str, tuple[int, int]] = {
    "SIGKILL": (signal.SIGKILL, -9),
    "SIGTERM": (signal.SIGTERM, 143),
    "SIGINT": (signal.SIGINT, 130),
}


def clean_end(kind: str, ended: Ended) -> str | None:
    """What is wrong with how a child ended that was sent this signal; None if nothing is."""
    if ended.code != SIGNALS[kind][1]:
        return f"{kind}: exit code {ended.code}: {ended.err[-2000:]}"
    lines = [line for line in ended.err.splitlines() if line.startswith("interrupted by")]
    if kind != "SIGKILL" and (len(lines) != 1 or "go on with: compressllm" not in lines[0]):
        return f"{kind}: says {ended.err[-2000:]!r}"
    return None


def clean_refusal(ended: Ended) -> str | None:
    """What is wrong with how a child ended whose disk failed; None if nothing is."""
    lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
    if ended.code != 2 or len(lines) != 1 or "Traceback" in ended.err:
        return f"exit code {ended.code}: {ended.err[-2000:]}"
    return None
