"""What chosen records are worth in recovery: PASER's, random ones, and all of them, at equal tokens.

    python benchmarks/paser_recovery.py --student PRUNED --teacher demo --data INSTRUCT.jsonl.gz --folder SCRATCH \\
        --rows full,random,paser --seeds 0,1,2 --tokens 196608 --tasks arc_easy,piqa --task-files EVAL_FOLDER

Records need `capability`, a label, beside instruction, input and output. Of each capability some, the same every time,
are kept out of the pool; what is measured is the perplexity of their responses, and accuracy on tasks if any are named.
`student` and `teacher` are not trained. A row is a name of `ROWS`; one that the result file has already for the same
seed, tokens and settings is not measured again, so a stopped run goes on, in the middle of a row too.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from prune_speed import run_process

from compressllm.core.compute import choose_device
from compressllm.core.ranks import ALONE
from compressllm.models.bundle import open_bundle
from compressllm.recover.conversation import Encoded, encode_all
from compressllm.recover.heldout import HeldOut
from compressllm.recover.records import RecordConfig, Tally, read_records
from compressllm.recover.sharding import Replicated
from compressllm.recover.student import Student
from compressllm.recover.taskdata import PaddedRows
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "paser_recovery.json"
#: Row -> how records are chosen; the budget is the command's.
ROWS: dict[str, Any] = {
    "full": None,
    "random": "random",
    "longest": "longest",
    "kd-gap": "kd-gap",
    "paser": "paser",
    "paser-clusters": {"paser": {"share": "clusters"}},
    "paser-no-concepts": {"paser": {"concepts": False}},
}
UNTRAINED = ("student", "teacher")


def split(data: Path, folder: Path, each: int, share: float) -> tuple[Path, dict[str, Path]]:
    """The pool, and the held-out records of each capability; made once, by the hash of a record alone.

    Args:
        share: Of the other records, what the pool is made of.
    """
    lines = [line for line in gzip.open(data, "rt") if line.strip()]  # noqa: SIM115
    by_label: dict[str, list[tuple[str, str]]] = defaultdict(list)
    hashed = [hashlib.sha256(line.encode()).hexdigest() for line in lines]
    for digest, line in zip(hashed, lines, strict=True):
        by_label[json.loads(line)["capability"]].append((digest, line))
    pool, kept = folder / "pool.jsonl", {label: folder / f"held-out-{label}.jsonl" for label in sorted(by_label)}
    aside = {label: sorted(found)[:each] for label, found in by_label.items()}
    out = {line for found in aside.values() for _, line in found}
    most = share * 16**8
    pairs = zip(hashed, lines, strict=True)
    pool.write_text("".join(line for digest, line in pairs if int(digest[-8:], 16) < most and line not in out))
    for label, path in kept.items():
        path.write_text("".join(line for _, line in aside[label]))
    return pool, kept


def response_perplexity(model: str, files: dict[str, Path], seqlen: int) -> dict[str, float]:
    """Capability -> perplexity of the held-out responses, each token counted once, and `all` of them."""
    bundle, device = open_bundle(model), choose_device("auto")
    student = Student(bundle.live(torch.float32, device))
    nll: dict[str, tuple[float, int]] = {}
    for label, path in files.items():
        read = [messages for _, messages in read_records(path, RecordConfig(), Tally())]
        encoded = encode_all(read, bundle.tokenizer)
        records = [one for one in encoded if isinstance(one, Encoded) and len(one.ids) <= seqlen]
        rows = PaddedRows(sorted(records, key=lambda one: len(one.ids)), 0)
        tokens = sum(sum(one.said[1:]) for one in records)
        nll[label] = HeldOut(rows, Replicated(ALONE, device), 4).student_nll(student), tokens
    mean = sum(loss * tokens for loss, tokens in nll.values()) / sum(tokens for _, tokens in nll.values())
    return {label: math.exp(loss) for label, (loss, _) in nll.items()} | {"all": math.exp(mean)}


def settings_of(row: str, options: argparse.Namespace, pool: Path) -> dict[str, Any]:
    """Of the recover stage."""
    recover: dict[str, Any] = {
        "teacher": options.teacher,
        "records": [str(pool)],
        "seqlen": options.seqlen,
        "max_tokens": options.tokens,
        "losses": options.losses,
        "lr": options.lr,
    }
    if (method := ROWS[row]) is not None:
        recover["select"] = {"method": method, "budget": options.budget}
    return recover


def measure(row: str, seed: int, options: argparse.Namespace, pool: Path, held_out: dict[str, Path]) -> dict[str, Any]:
    """Recover, then look at the held-out responses and the tasks."""
    tasks = {"tasks": options.tasks, "task_files": options.task_files, "limit": options.limit}
    stages: list[dict[str, Any]] = [{"eval": tasks}] if options.tasks else []
    made: dict[str, Any] = {"row": row, "seed": seed, "tokens": 0}
    model = getattr(options, row, None)
    if row in UNTRAINED:
        recipe: dict[str, Any] = {"model": model, "seed": seed, "stages": stages}
    else:
        recover = settings_of(row, options, pool)
        recipe = {"model": options.student, "seed": seed, "stages": [{"recover": recover}, *stages]}
    name = f"{row}-{seed}-{options.tokens}"
    path, out = options.folder / f"{name}.yaml", options.folder / name
    path.write_text(yaml.safe_dump(recipe))
    if recipe["stages"]:
        command = [sys.executable, "-m", "compressllm", "run", str(path), str(out), "--json"]
        seconds, peak, text = run_process(command)
        done = json.loads(text)["stages"]
        made |= {"process_seconds": seconds, "peak_bytes": peak}
        if options.tasks:
            made["tasks"] = {
                task: {name: value["value"] for name, value in found["metrics"].items()}
                for task, found in done[-1]["metrics"]["tasks"].items()
            }
        if row not in UNTRAINED:
            made |= {"tokens": options.tokens, "recover": done[0]["metrics"], "settings": recover}
            model = str(out)
    made["response_perplexity"] = response_perplexity(str(model), held_out, options.seqlen)
    return made | {"loadavg": os.getloadavg()[0], "date": datetime.now(UTC).isoformat(timespec="seconds")}


def key_of(made: dict[str, Any]) -> tuple[Any, ...]:
    """What tells two measurements apart."""
    told = made.get("settings", {})
    budget = (told.get("select") or {}).get("budget")
    return made["row"], made["seed"], made["tokens"], budget, told.get("losses"), told.get("lr")


def summary(results: list[dict[str, Any]]) -> None:
    """Mean and spread over seeds, a row a choice."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for made in results:
        row, _, *rest = key_of(made)
        groups[(row, *rest)].append(made)
    for (row, tokens, *_), found in groups.items():
        values = [one["response_perplexity"]["all"] for one in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{row:18} {tokens:8} tokens  {statistics.mean(values):8.3f} +- {spread:.3f}  ({len(values)} seeds)")


def main() -> None:
    """Measure the rows that are missing, keep the JSON up to date, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="a pruned model")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--data", type=Path, required=True, help="gzipped JSON lines with `capability`")
    parser.add_argument("--folder", type=Path, required=True, help="for run folders; kept")
    parser.add_argument("--rows", default="student,teacher,full,random,paser")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=196_608)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--losses", default="kl=1.0")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--share", type=float, default=1.0, help="of the records, what the pool is made of")
    parser.add_argument("--each", type=int, default=20, help="held-out records of each capability")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[])
    parser.add_argument("--task-files", type=lambda text: text.split(","), default=[])
    parser.add_argument("--limit", type=float, help="items of each task")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pool, held_out = split(options.data, options.folder, options.each, options.share)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    if record.get("pool_share", options.share) != options.share:
        sys.exit(f"{options.out}: was measured on another share of the records; name another file")
    record |= {
        "what": "perplexity of held-out responses after recovery on records chosen in several ways",
        "command": "python benchmarks/paser_recovery.py, see its head",
        "held_out_each": options.each,
        "pool_share": options.share,
        "environment": environment(),
    }
    known = {key_of(made) for made in record["results"]}
    for seed in map(int, options.seeds.split(",")):
        for row in options.rows.split(","):
            if row in UNTRAINED:
                key: tuple[Any, ...] = (row, 0, 0, None, None, None)
                if seed != int(options.seeds.split(",")[0]):
                    continue
            else:
                budget = options.budget if ROWS[row] is not None else None
                key = (row, seed, options.tokens, budget, options.losses, options.lr)
            if key in known:
                continue
            made = measure(row, 0 if row in UNTRAINED else seed, options, pool, held_out)
            record["results"].append(made)
            print(f"{row:18} seed {seed} {made['response_perplexity']}", flush=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")
    summary(record["results"])


if __name__ == "__main__":
    main()
