"""What stages are estimated to take of memory against what they took, on the demo model; and the 8B-shaped checkpoint.

    python benchmarks/memory_guard.py --rows export,eval --folder SCRATCH

Each row is a recipe of one stage in a process of its own, and both numbers are those of its manifest. Rows that are in
the file already are left alone. The last rows estimate what `memory.py` measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

from compressllm.models.bundle import Bundle
from compressllm.prune.config import PruneConfig
from compressllm.stages.environment import environment, resident_bytes
from compressllm.stages.memory import estimate

RESULTS = Path(__file__).parent / "results"
FEW = {"source": "builtin", "samples": 4, "seqlen": 512}

#: Row -> the stage, and whether it works on the pruned model.
STAGES: dict[str, tuple[dict[str, Any], bool]] = {
    "export": ({"export": {"format": "packed"}}, True),
    "eval": ({"eval": {"source": "builtin", "windows": 2, "seqlen": 1024, "backend": "dense"}}, False),
    "prune magnitude": ({"prune": {"method": "magnitude", "pattern": "2:4"}}, False),
    "prune wanda": ({"prune": {"method": "wanda", "pattern": "2:4", "calibration": FEW}}, False),
    "prune wanda 0.5": ({"prune": {"method": "wanda", "pattern": "0.5", "calibration": FEW}}, False),
    "prune sparsegpt": ({"prune": {"method": "sparsegpt", "pattern": "2:4", "calibration": FEW}}, False),
    "quantize rtn": ({"quantize": {"method": "rtn", "scheme": "int8"}}, True),
    "quantize gptq": ({"quantize": {"method": "gptq", "scheme": "int4-g64", "calibration": FEW}}, True),
    "permute": ({"permute": {"pattern": "2:4", "rounds": 1, "calibration": FEW}}, False),
    "recover alone": ({"recover": {"losses": "ce=1.0", "max_tokens": 4096, "save_every": 1}}, True),
    "recover": ({"recover": {"teacher": "demo", "max_tokens": 4096, "save_every": 1}}, True),
    "reconstruct": (
        {
            "prune": {
                "method": "wanda",
                "pattern": "2:4",
                "calibration": FEW,
                "reconstruct": {"epochs": 1, "batch": 4},
            }
        },
        False,
    ),
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run a row's stage, and give its manifest's numbers."""
    stage, pruned = STAGES[name]
    model = "demo"
    if pruned:
        model = str(folder / "pruned")
        if not Path(model).exists():
            _run({"model": "demo", "stages": [{"prune": {"method": "magnitude", "pattern": "2:4"}}]}, Path(model))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        manifest = _run({"model": model, "stages": [stage]}, Path(scratch) / "run")
    (done,) = manifest["stages"]
    return _row(name, done["estimated_memory_bytes"], done["peak_memory_bytes"]) | {
        "seconds": done["seconds"],
        "stage": stage,
        "threads": manifest["environment"]["threads"],
    }


def _run(recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    path = out.with_suffix(".json")  # JSON is YAML
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "compressllm", "run", str(path), str(out), "--json"]
    env = {**os.environ, "COMPRESSLLM_MEMORY": "0"}  # measured even where little is left
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    return dict(json.loads((out / "manifest.json").read_text()))


def estimate_8b(method: str) -> dict[str, Any]:
    """What is estimated for the run that ``memory-llama-3-8b-METHOD.json`` has the peak of."""
    measured = json.loads((RESULTS / f"memory-llama-3-8b-{method}.json").read_text())
    count, seqlen = measured["windows"]
    config = LlamaConfig(**SHAPES["llama-3-8b"], dtype="bfloat16")
    with torch.device("meta"):
        bundle = Bundle(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), None)
    calibration = {"source": "builtin", "samples": count, "seqlen": seqlen}
    settings = PruneConfig(method=method, pattern="2:4", dtype="float32", calibration=calibration)
    torch.set_num_threads(measured["environment"]["threads"])
    return _row(f"8B {method}", resident_bytes() + estimate("prune", bundle, settings).bytes, measured["peak_bytes"])


def _row(name: str, estimated: int, measured: int) -> dict[str, Any]:
    return {"row": name, "estimated": estimated, "measured": measured, "ratio": round(estimated / measured, 3)}


def main() -> None:
    """Measure the rows that are asked for and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join([*STAGES, "8B wanda", "8B sparsegpt"]))
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, which keeps the pruned model")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_guard.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    for name in options.rows.split(","):
        if any(row["row"] == name for row in record["rows"]) and not options.again:
            continue
        row = estimate_8b(name.removeprefix("8B ")) if name.startswith("8B ") else measure(name, options.folder)
        row |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "loadavg": round(os.getloadavg()[0], 1)}
        print(f"{name}: estimated {row['estimated'] / 1e6:.0f} MB, measured {row['measured'] / 1e6:.0f} MB, "
              f"ratio {row['ratio']}", flush=True)  # fmt: skip
        record["rows"] = [one for one in record["rows"] if one["row"] != name] + [row]
        record |= {
            "what": "estimated and measured peak of resident memory, on the demo model; 8B rows against memory-*.json",
            "command": "python benchmarks/memory_guard.py --folder SCRATCH",
            "environment": environment(),
        }
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
