"""WikiText-2 perplexity of the demo model, dense and pruned to 2:4, under the papers' protocol.

    python benchmarks/wikitext2.py --data wikitext2

Calibrates on the builtin text, never on WikiText-2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compressllm.cli.output import show, warn
from compressllm.stages.environment import environment
from compressllm.stages.recipe import make_recipe
from compressllm.stages.runner import run_recipe

RESULT = Path(__file__).parent / "results" / "wikitext2.json"


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="wikitext2", help="WikiText-2 raw test: wikitext2, or a file of its rows")
    parser.add_argument("--calibration", default="builtin", help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, help="only the first so many")
    parser.add_argument("--methods", default="wanda,magnitude")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()

    measure = {"eval": {"source": options.data, "seqlen": options.eval_seqlen, "windows": options.windows}}
    calibration = {"source": options.calibration, "samples": options.samples, "seqlen": options.seqlen}
    rows: list[dict[str, Any]] = []
    for method in ("dense", *options.methods.split(",")):
        pruning = {"prune": {"method": method, "pattern": options.pattern, "calibration": calibration}}
        stages = [measure] if method == "dense" else [pruning, measure]
        recipe = make_recipe({"model": options.model, "stages": stages})
        with tempfile.TemporaryDirectory() as folder:
            manifest = run_recipe(recipe, Path(folder) / "run", show=show, on_warning=warn)
        *pruned, evaluated = manifest["stages"]
        row = {"method": method, "perplexity": evaluated["metrics"]["perplexity"], "eval_seconds": evaluated["seconds"]}
        for stage in pruned:
            row |= {"prune_seconds": stage["seconds"], "prune_peak_bytes": stage["peak_memory_bytes"]}
            row |= {key: stage["metrics"][key] for key in ("sparsity", "masks_sha256", "calibration", "dtype")}
        rows.append(row)
        print(f"{method:10} {row['perplexity']:.4f}", flush=True)
        protocol, text = evaluated["metrics"]["protocol"], evaluated["metrics"]["text_sha256"]

    record = {
        "what": f"WikiText-2 raw test perplexity, {options.pattern}",
        "command": " ".join(["python benchmarks/wikitext2.py", *(Path(a).name for a in sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": options.model,
        "protocol": protocol.replace(options.data, Path(options.data).name),
        "text_sha256": text,
        "environment": environment(),
        "results": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
