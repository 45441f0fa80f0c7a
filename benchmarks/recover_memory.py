"""Peak memory of a few steps of recovery in each of its modes, beside what weights and moments alone should take.

    python benchmarks/recover_memory.py --student PRUNED --teacher demo --data TEXT

Every row is a process of its own on one thread, so that one micro-batch is alive at a time; `threads2` is `fixed` with
two. Rows compute in float32 unless they say otherwise. `static_bytes` is counted: weights, gradients, moments and
teacher; what is above it and the interpreter is activations, logits and the allocator's. Rows that the result file has
already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prune_speed import run_process

from compressllm.models.bundle import open_bundle
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "recover_memory.json"
MASKLORA = {"train": "{masklora: {rank: 16}}"}
#: Row -> flags of the command beside the common ones.
ROWS: dict[str, dict[str, str]] = {
    "fixed": {},
    "threads2": {},
    "ce": {"losses": "ce=1.0"},
    "squarehead": {"losses": "kl=1.0,squarehead=1.0"},
    "teacher-cache": {"teacher-cache": "64"},
    "bfloat16": {"dtype": "bfloat16"},
    "ast": {"masking": "ast"},
    "deferred": {"masking": "deferred"},
    "masklora": MASKLORA,
    "masklora-bfloat16": MASKLORA | {"dtype": "bfloat16"},
    "bias-norm": {"train": "bias-norm"},
    "activation-checkpointing": {"activation-checkpointing": "true"},
}


def static_bytes(row: str, flags: dict[str, str], parameters: int, trained: int) -> int:
    """Bytes of what lives through all steps: parameters, gradients, moments, masters, and a resident teacher."""
    computes = 2 if flags.get("dtype") == "bfloat16" else 4
    apart = trained if computes == 2 or flags.get("masking") in ("ast", "deferred") else 0  # weights behind parameters
    teacher = 0 if row in ("ce", "teacher-cache") else parameters
    return computes * (parameters + teacher) + 4 * (apart + 3 * trained)


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """A few steps in a process of its own."""
    flags = {"losses": "kl=1.0", "teacher": options.teacher, "dtype": "float32", **ROWS[row]}
    if flags["losses"] == "ce=1.0":
        del flags["teacher"]
    command = [
        sys.executable, "-m", "compressllm", "recover", options.student, "OUT", "--data", options.data, "--seqlen",
        str(options.seqlen), "--batch-tokens", str(2 * options.seqlen), "--micro-batch", "1", "--max-tokens",
        str(2 * options.steps * options.seqlen), "--held-out", "0.001", "--evaluate-every", "1", "--save-every", "1",
        "--json",
    ]  # fmt: skip
    for name, value in flags.items():
        command += [f"--{name}"] if value == "true" else [f"--{name}", value]
    os.environ["OMP_NUM_THREADS"] = "2" if row == "threads2" else "1"
    with tempfile.TemporaryDirectory() as folder:
        command[command.index("OUT")] = str(Path(folder) / "out")
        seconds, peak, text = run_process(command)
    metrics = json.loads(text)["stages"][0]["metrics"]
    parameters = sum(math.prod(spec.shape) for spec in weights(options.student).values())
    static = static_bytes(row, flags, parameters, metrics["trained_parameters"])
    return {
        "row": row,
        "flags": ROWS[row],
        "seqlen": options.seqlen,
        "steps": options.steps,
        "parameters": parameters,
        "trained_parameters": metrics["trained_parameters"],
        "peak_bytes": peak,
        "static_bytes": static,
        "process_seconds": seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def weights(model: str) -> Any:
    """Stored tensors of a model."""
    checkpoint = open_bundle(model).checkpoint
    return checkpoint.specs if checkpoint else {}


def main() -> None:
    """Measure the rows that are missing and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="a pruned model")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    bare = run_process([sys.executable, "-c", "import compressllm.recover.model"])[1]
    record |= {
        "what": "peak resident bytes of recovery by mode",
        "command": "python benchmarks/recover_memory.py --student PRUNED --teacher demo --data TEXT",
        "interpreter_bytes": bare,
        "environment": environment(),
    }
    known = {(made["row"], made["seqlen"], made["steps"]) for made in record["results"]}
    for row in options.rows.split(","):
        if (row, options.seqlen, options.steps) in known:
            continue
        made = measure(row, options)
        record["results"].append(made)
        print(f"{row:26} peak {made['peak_bytes'] / 1e9:.2f} GB, static {made['static_bytes'] / 1e9:.2f} GB, "
              f"above both {(made['peak_bytes'] - made['static_bytes'] - bare) / 1e9:.2f} GB", flush=True)  # fmt: skip
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
