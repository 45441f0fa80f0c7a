"""Peak memory of pruning a checkpoint against its size: random weights of a real model's shape.

    python benchmarks/memory.py --shape llama-3.2-1b --methods wanda,sparsegpt --folder SCRATCH

The pruning is the command a user types, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from prune_speed import run_process
from shapes import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

from compressllm.models.shards import ShardWriter
from compressllm.models.tensorfile import TensorSpec
from compressllm.stages.environment import environment

RESULTS = Path(__file__).parent / "results"


def make_checkpoint(folder: Path, shape: str) -> int:
    """Write a bfloat16 checkpoint of normal weights, tensor by tensor; its bytes."""
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    stored = {name: p for name, p in model.named_parameters() if name not in model.all_tied_weights_keys}
    layout = {name: TensorSpec(torch.bfloat16, tuple(p.shape)) for name, p in stored.items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    writer = ShardWriter(folder, layout)
    generator = torch.Generator().manual_seed(0)
    for name, spec in layout.items():
        values = torch.empty(spec.shape, dtype=torch.bfloat16)
        writer.write(name, values.fill_(1) if len(spec.shape) == 1 else values.normal_(std=0.02, generator=generator))
    writer.finish()
    return sum(spec.bytes for spec in layout.values())


def measure(folder: Path, method: str) -> dict[str, Any]:
    """Prune the checkpoint in ``folder``, verify what came out, and remove it."""
    out = folder / "run"
    command = [sys.executable, "-m", "compressllm", "prune", str(folder / "dense"), str(out), "--method", method]
    seconds, peak, text = run_process([*command, "--data", str(folder / "ids.npy"), "--json"])
    check = [sys.executable, "-m", "compressllm", "verify", str(out), "--pattern", "2:4"]
    sound = subprocess.run(check, capture_output=True, check=False).returncode == 0
    shutil.rmtree(out)
    print(f"{method}: pruned in {seconds:.0f} s, peak {peak / 1e9:.2f} GB, verified: {sound}", flush=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "process_seconds": seconds,
        "prune_seconds": json.loads(text)["stages"][0]["seconds"],
        "peak_bytes": peak,
        "verified": sound,
        "loadavg": os.getloadavg()[0],
    }


def main() -> None:
    """Make the checkpoint, prune it, verify it, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--methods", default="wanda")
    parser.add_argument("--windows", default="8x256", help="random token ids, windows x tokens")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the checkpoints, removed at the end")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON, one file a method")
    options = parser.parse_args()
    try:
        size = make_checkpoint(options.folder / "dense", options.shape)
        shape = tuple(map(int, options.windows.split("x")))
        ids = np.random.default_rng(0).integers(0, SHAPES[options.shape]["vocab_size"], shape)
        np.save(options.folder / "ids.npy", ids)
        for method in options.methods.split(","):
            record = measure(options.folder, method) | {"checkpoint_bytes": size, "windows": shape}
            record["what"] = f"peak resident memory of {method} at 2:4 on random weights of {options.shape}'s shape"
            record["command"] = (
                f"python benchmarks/memory.py --shape {options.shape} --methods {method} "
                f"--windows {options.windows} --folder SCRATCH"
            )
            options.results.mkdir(parents=True, exist_ok=True)
            out = options.results / f"memory-{options.shape}-{method}.json"
            out.write_text(json.dumps(record, indent=2) + "\n")
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
