"""What a student learns from its teacher and what from the text: KL against cross entropy where the teacher knows the
text, and where it does not.

    python benchmarks/teacher_or_text.py --teacher STORIES260K --own STORIES.jsonl.gz --other WEB.jsonl.gz

The teacher is a small model that knows one kind of text, `own`; the student is it at 2:4 by size. Both kinds are
trained on, half and half, and perplexity is measured on documents of each that were not: those at even places are
trained on, those at odd ones measured. Every row is as many tokens. Rows that the result file has already are not
measured again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compressllm.core.ranks import ALONE
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.recover.config import RecoverConfig
from compressllm.recover.heldout import HeldOut
from compressllm.recover.model import recover_model
from compressllm.recover.sharding import Replicated
from compressllm.recover.student import Student
from compressllm.recover.textdata import load_text
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "teacher_or_text.json"
KL, CE, BOTH = {"losses": "kl=1.0"}, {"losses": "ce=1.0"}, {"losses": "ce=0.33,kl=0.67"}
HALF = {"batch_tokens": 512, "micro_batch": 4}
#: Row -> settings beside the common ones; `dense` trains the teacher itself, `corrected` distils from what that made.
ROWS: dict[str, dict[str, Any]] = {
    "kl": KL,
    "ce": CE,
    "kl+ce": BOTH,
    "dense": CE | {"masking": "none"},
    "corrected": KL,
    "kl-lr3e-4": KL | {"lr": 3e-4},
    "ce-lr3e-4": CE | {"lr": 3e-4},
    "kl-lr3e-3": KL | {"lr": 3e-3},
    "ce-lr3e-3": CE | {"lr": 3e-3},
    "kl-half-batch": KL | HALF,
    "ce-half-batch": CE | HALF,
}
#: What of the manifest is kept.
TOLD = ("steps", "best_step", "tokens", "trained_parameters", "held_out_perplexity", "gap_closed")
COMMON: dict[str, Any] = {"seqlen": 128, "batch_tokens": 1024, "micro_batch": 8, "lr": 1e-3, "save_every": 1.0}


def split(options: argparse.Namespace, scratch: Path) -> None:
    """Train and evaluation documents of both kinds, as files."""
    for kind in ("own", "other"):
        documents = [json.loads(line)["text"] for line in gzip.open(getattr(options, kind), "rt")]  # noqa: SIM115
        for part, texts in (("train", documents[::2]), ("eval", documents[1::2])):
            (scratch / f"{kind}-{part}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def perplexity(bundle: Bundle, scratch: Path) -> dict[str, float]:
    """Of both kinds of text, on the first windows of what was not trained on."""
    student, found = Student(bundle.live(torch.float32)), {}
    for kind in ("own", "other"):
        rows = load_text(
            [str(scratch / f"{kind}-eval.jsonl")], bundle.tokenizer, COMMON["seqlen"], held_out=0.4, most_held_out=80,
            max_seqlen=bundle.max_seqlen, vocab_size=bundle.vocab_size,
        ).held_out  # fmt: skip
        found[kind] = math.exp(HeldOut(rows, Replicated(ALONE, torch.device("cpu")), 8).student_nll(student))
    return found


def recovered(row: str, options: argparse.Namespace, seed: int, scratch: Path) -> tuple[Bundle, dict[str, Any]]:
    """What a row trains, and the manifest's word on it."""
    folder = scratch / f"{row}-{seed}"
    folder.mkdir()
    teacher = options.teacher
    if row == "corrected":
        recovered("dense", options, seed, scratch)
        teacher = str(scratch / f"dense-{seed}" / "model")
    settings = {**COMMON, **ROWS[row], "max_tokens": options.tokens, "mixture": (1.0, 1.0)}
    settings["data"] = tuple(str(scratch / f"{kind}-train.jsonl") for kind in ("own", "other"))
    config = RecoverConfig(**settings, teacher=None if settings["losses"] == "ce=1.0" else teacher)
    student = options.teacher if row == "dense" else str(scratch / "pruned" / "model")
    run = Run(seed, folder)
    return recover_model(open_bundle(student), config, run), {name: run.metrics[name] for name in TOLD}


def measure(row: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One row, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        scratch, facts = Path(folder), None
        split(options, scratch)
        (scratch / "pruned").mkdir()
        bundle = open_bundle(options.teacher)
        if row != "teacher":
            bundle = prune_model(bundle, PruneConfig(method="magnitude", pattern="2:4"), Run(folder=scratch / "pruned"))
        if row in ROWS:
            bundle, facts = recovered(row, options, seed, scratch)
        made = {"row": row, "seed": seed, "tokens": options.tokens if facts else 0}
        made |= {"perplexity": perplexity(bundle, scratch), "settings": ROWS.get(row), "recover": facts}
        return made | {"date": datetime.now(UTC).isoformat(timespec="seconds")}


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--own", type=Path, required=True, help="gzipped JSON lines of text that the teacher knows")
    parser.add_argument("--other", type=Path, required=True, help="likewise, of a kind that it does not")
    parser.add_argument("--rows", default="teacher,student," + ",".join(ROWS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=int, default=49152)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    record |= {
        "what": "perplexity after recovery where the teacher knows the text (own) and where it does not (other)",
        "command": "python benchmarks/teacher_or_text.py, see its head",
        "files": {"own": options.own.name, "other": options.other.name},
        "environment": environment(),
    }
    for seed in map(int, options.seeds.split(",")):
        for row in options.rows.split(","):
            tokens = options.tokens if row in ROWS else 0
            if any((r["row"], r["seed"], r["tokens"]) == (row, seed, tokens) for r in record["results"]):
                continue
            made = measure(row, options, seed)
            record["results"].append(made)
            print(f"{row:14} seed {seed} {made['perplexity']}", flush=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
