"""Perplexity of a pruned model after recovery training in several ways, each on the same number of the same tokens.

    python benchmarks/recovery.py --student RUN --teacher demo --data wikitext2 --rows kl,ce,ast --tokens 98304 \\
        --eval wikitext2

A row is a name of `ROWS`, which says what differs from the stage's defaults. Those whose masks move begin with the
teacher's weights and masks by size, all others with the student; `student` and `teacher` are not trained. `dense-ce`
trains the dense model itself on the text, which says how much of a perplexity is the text's manner; `kl-corrected`
first trains the teacher so, for as many tokens at a third of the rate. Every row is a process of its own, its result
verified, exported packed and loaded again. Rows that the result file has already for as many tokens and the same seed
are not measured again, so a stopped run goes on; with --keep so does a stopped row, whose seconds are then those since.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from prune_speed import run_process

from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "recovery.json"
ROWS: dict[str, dict[str, Any]] = {
    "kl": {"losses": "kl=1.0"},
    "ce": {"losses": "ce=1.0"},
    "kl+ce": {"losses": "ce=0.33,kl=0.67"},
    "reverse-kl": {"losses": "reverse_kl=1.0"},
    "kl+squarehead": {"losses": "kl=1.0,squarehead=1.0"},
    "kl-t2": {"losses": "kl=1.0", "temperature": 2.0},
    "kl-lr6e-4": {"losses": "kl=1.0", "lr": 6e-4},
    "kl-lr1e-3": {"losses": "kl=1.0", "lr": 1e-3},
    "kl-half-batch": {"losses": "kl=1.0", "batch_tokens": 1024},
    "kl-quarter-batch": {"losses": "kl=1.0", "batch_tokens": 512, "micro_batch": 1},
    "kl-half-batch-lr6e-4": {"losses": "kl=1.0", "batch_tokens": 1024, "lr": 6e-4},
    "ce-half-batch-lr6e-4": {"losses": "ce=1.0", "batch_tokens": 1024, "lr": 6e-4},
    "kl+ce-half-batch-lr6e-4": {"losses": "ce=0.33,kl=0.67", "batch_tokens": 1024, "lr": 6e-4},
    "ast": {"losses": "kl=1.0", "masking": "ast"},
    "ast-static": {"losses": "kl=1.0", "masking": "ast", "decay": "static"},
    "ast-reversed": {"losses": "kl=1.0", "masking": "ast", "decay": "reversed"},
    "ast-no-decay-no-moves": {"losses": "kl=1.0", "masking": "ast", "decay": "none", "refresh": 1_000_000},
    "deferred": {"losses": "kl=1.0", "masking": "deferred"},
    "deferred-no-scales": {"losses": "kl=1.0", "masking": "deferred", "scales": 0},
    "gradual": {"losses": "kl=1.0", "masking": "gradual"},
    "mask-decay": {"losses": "kl=1.0", "masking": "mask-decay"},
    "structure-decay": {"losses": "kl=1.0", "masking": "structure-decay"},
    "dense-ce": {"losses": "ce=1.0", "masking": "none"},
    "kl-corrected": {"losses": "kl=1.0", "corrected": True},
    "masklora": {"losses": "kl=1.0", "train": "masklora", "lr": 2e-3},
    "spp": {"losses": "kl=1.0", "train": "spp", "lr": 4e-3},
    "bias-norm": {"losses": "kl=1.0", "train": "bias-norm", "lr": 5e-3},
    "masklora-half-batch": {"losses": "kl=1.0", "train": "masklora", "lr": 2e-3, "batch_tokens": 1024},
}
SMALL = {"batch_tokens": 1024, "micro_batch": 1}
ROWS |= {
    "dense-ce-half-batch-lr2e-4": ROWS["dense-ce"] | SMALL | {"lr": 2e-4, "betas": [0.9, 0.999]},
    "kl+ce-half-batch-lr6e-4-beta0.95": ROWS["kl+ce"] | SMALL | {"lr": 6e-4, "betas": [0.9, 0.95]},
    "kl+ce-half-batch-lr6e-4-beta0.999": ROWS["kl+ce"] | SMALL | {"lr": 6e-4, "betas": [0.9, 0.999]},
    "kl+ce-half-batch-lr1e-3-beta0.99": ROWS["kl+ce"] | SMALL | {"lr": 1e-3, "betas": [0.9, 0.99]},
    # At its peak until the last fifth, so that a longer training begins as a shorter one does.
    "kl+ce-half-batch-lr4e-4-beta0.99-constant": ROWS["kl+ce"]
    | SMALL
    | {"lr": 4e-4, "betas": [0.9, 0.99], "floor": 1.0, "cooldown": 0.2, "warmup_tokens": 24_576},
}
ROWS |= {
    f"{name}-half-batch-lr6e-4": ROWS[name] | {"batch_tokens": 1024, "lr": 6e-4}
    for name in ("kl+squarehead", "ast", "ast-static", "ast-reversed", "ast-no-decay-no-moves", "deferred")
}


def texts_of(options: argparse.Namespace) -> dict[str, str]:
    """Name -> source."""
    return dict(pair.rpartition("=")[::2] if "=" in pair else (pair, pair) for pair in options.eval.split(","))


def untrained(row: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Where training begins and what it comes from."""
    texts = texts_of(options)
    evals = [{"eval": {"source": t, "seqlen": options.eval_seqlen, "windows": options.windows}} for t in texts.values()]
    recipe = scratch / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": getattr(options, row), "seed": 0, "stages": evals}))
    command = [sys.executable, "-m", "compressllm", "run", str(recipe), str(scratch / "run"), "--json"]
    stages = json.loads(run_process(command)[2])["stages"]
    perplexity = {name: stage["metrics"]["perplexity"] for name, stage in zip(texts, stages, strict=True)}
    return {"row": row, "seed": 0, "tokens": 0, "perplexity": perplexity}


def measure(row: str, options: argparse.Namespace, seed: int, scratch: Path) -> dict[str, Any]:
    """Recover, verify, export, evaluate; what came out."""
    recover = {"teacher": options.teacher, "data": options.data.split(","), "max_tokens": options.tokens} | ROWS[row]
    recover |= {"seqlen": options.seqlen} | ({"mixture": options.mixture} if options.mixture else {})
    if rise := recover.pop("warmup_tokens", None):
        recover["warmup"] = min(0.05, rise / options.tokens)
    dense = ROWS[row].get("masking") == "none"
    if recover.pop("corrected", False):
        recover |= {"teacher_tokens": options.tokens, "teacher_lr": 1e-4}
    if recover["losses"] == "ce=1.0":
        del recover["teacher"]
    student = options.student
    if "masking" in recover:
        student = options.teacher
        recover |= {} if dense else {"pattern": options.pattern}
    texts = texts_of(options)
    evals = [{"eval": {"source": t, "seqlen": options.eval_seqlen, "windows": options.windows}} for t in texts.values()]
    stages = [{"recover": recover}, evals[0], {"export": {"format": "packed"}}, *evals]
    recipe, out = scratch / "recipe.yaml", scratch / "run"
    recipe.write_text(yaml.safe_dump({"model": student, "seed": seed, "stages": stages}))
    seconds, peak, text = run_process([sys.executable, "-m", "compressllm", "run", str(recipe), str(out), "--json"])
    recovered, before_export, _, *after = json.loads(text)["stages"]
    check = [sys.executable, "-m", "compressllm", "verify", str(out), "--pattern", options.pattern]
    sound = dense or subprocess.run(check, capture_output=True, check=False).returncode == 0
    perplexity = {name: stage["metrics"]["perplexity"] for name, stage in zip(texts, after, strict=True)}
    for source in recovered["metrics"]["data"]["sources"]:
        source["source"] = Path(source["source"]).name
    return {
        "row": row,
        "seed": seed,
        "tokens": options.tokens,
        "perplexity": perplexity,
        "verified": sound,
        "same_after_export": before_export["metrics"]["perplexity"] == after[0]["metrics"]["perplexity"],
        "process_seconds": seconds,
        "peak_bytes": peak,
        "recover": recovered["metrics"],
        "settings": ROWS[row],
        "loadavg": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def scratch_folder(keep: Path | None, name: str) -> Iterator[Path]:
    """Where a row is made: in a folder that stays, so that a killed row goes on, or in one that goes."""
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        (keep / name).mkdir(parents=True, exist_ok=True)
        yield keep / name


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="a pruned model")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--data", default="wikitext2", help="training text, sources or files with commas between")
    parser.add_argument("--mixture", type=lambda text: [float(share) for share in text.split(",")], help="their shares")
    parser.add_argument("--rows", default="kl,ce,ast")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--eval", default="wikitext2", help="NAME=SOURCE with commas between")
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="folder for what rows make; a killed row goes on from there")
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    record |= {
        "what": "perplexity after recovery training",
        "command": "python benchmarks/recovery.py --rows ROWS --tokens TOKENS, see benchmarks/README.md",
        "environment": environment(),
    }
    for seed in map(int, options.seeds.split(",")):
        for row in options.rows.split(","):
            tokens = options.tokens if row in ROWS else 0
            if any((r["row"], r["tokens"], r["seed"]) == (row, tokens, seed) for r in record["results"]):
                continue
            with scratch_folder(options.keep, f"{row}-{tokens}-{seed}") as scratch:
                made = measure(row, options, seed, scratch) if row in ROWS else untrained(row, options, scratch)
            record["results"].append(made)
            print(f"{row:16} seed {seed} {tokens:8} tokens {made['perplexity']}", flush=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
