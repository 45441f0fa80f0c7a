"""Peak memory of loading a packed model onto its kernels, against the size of its file.

    python benchmarks/random_packed.py SCRATCH && python benchmarks/load_memory.py SCRATCH

Each way to load runs in a process of its own. ``growth`` is what the load adds to what Python, torch and transformers
take by themselves. transformers maps the file, and what it has read of it counts as resident although the system can
drop it at any time; ``anonymous`` leaves that out. Its peak is looked at every few milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compressllm.stages.environment import PeakMemory, environment, resident_bytes

RESULT = Path(__file__).parent / "results" / "load_memory.json"
WAYS = ("compressllm", "transformers")


def load(folder: str, way: str) -> dict[str, Any]:
    """Load in this process; bytes before and at the peak, and what the model holds."""
    import torch
    from transformers import AutoModelForCausalLM

    from compressllm.bench.model import held_bytes
    from compressllm.kernels.linear import SparseLinear
    from compressllm.models.bundle import open_bundle
    from compressllm.stages.evaluate import EvalConfig, prepare_linears

    torch.ones(8) @ torch.ones(8)
    before, anonymous_before, peak = resident_bytes(), anonymous_bytes(), PeakMemory()
    anonymous, loaded = [anonymous_before], threading.Event()
    watcher = threading.Thread(target=_watch, args=(anonymous, loaded))
    watcher.start()
    if way == "compressllm":
        model, _ = prepare_linears(open_bundle(folder), EvalConfig(dtype="bfloat16", device="cpu"))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, variant="packed")
    loaded.set()
    watcher.join()
    return {
        "before_bytes": before,
        "peak_bytes": peak.bytes(),
        "anonymous_before_bytes": anonymous_before,
        "anonymous_peak_bytes": max(anonymous),
        "held_bytes": held_bytes(model),
        "sparse_linears": sum(isinstance(module, SparseLinear) for module in model.modules()),
    }


def _watch(seen: list[int], end: threading.Event) -> None:
    while not end.wait(0.005):
        seen.append(anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def main() -> None:
    """Load it every way and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a packed model")
    parser.add_argument("--one", choices=WAYS, help="load in this process and print what it took")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(load(options.folder, options.one)))
        return
    size = sum(path.stat().st_size for path in Path(options.folder).glob("*.safetensors"))
    rows = {}
    for way in WAYS:
        command = [sys.executable, __file__, options.folder, "--one", way]
        quick = {**os.environ, "COMPRESSLLM_MEASURE": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=quick)
        rows[way] = row = json.loads(done.stdout.splitlines()[-1])
        row["growth_over_file"] = (row["peak_bytes"] - row["before_bytes"]) / size
        row["peak_over_file"] = row["peak_bytes"] / size
        row["anonymous_growth_over_file"] = (row["anonymous_peak_bytes"] - row["anonymous_before_bytes"]) / size
        print(
            f"{way}: peak {row['peak_over_file']:.3f} of the file, growth {row['growth_over_file']:.3f}, "
            f"of it not mapped {row['anonymous_growth_over_file']:.3f}"
        )
    record = {
        "what": "peak resident memory of loading a packed 2:4 checkpoint onto the kernels",
        "command": "python benchmarks/random_packed.py SCRATCH && python benchmarks/load_memory.py SCRATCH",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "file_bytes": size,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
