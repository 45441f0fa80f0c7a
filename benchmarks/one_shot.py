"""WikiText-2 perplexity, time and memory of one-shot methods on one model, all calibrated on the same token ids.

    python benchmarks/one_shot.py --calibration c4 --data wikitext2 --rows dense,wanda,admm,permute+admm+reconstruct

A row is a pruner's name, with what goes before and after it: `permute+`, `gather+`, `+reconstruct`, `+sequential`; or
`best`, the recipe best-one-shot-2of4 with its calibration text replaced; or `theirs:METHOD`, the authors' own code (see
reference.py), for which --reference METHOD=CLONE and --reference-python are needed. Every row is a process of its own.
Rows that the result file has already are not measured again, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from calibrated import add_options, measure_rows
from prune_speed import run_process

from compressllm.core.compute import cpu_name
from compressllm.models.bundle import open_bundle

HERE = Path(__file__).parent
RESULT = HERE / "results" / "one_shot.json"
BEST = HERE.parent / "recipes" / "best-one-shot-2of4.yaml"
SPECS: dict[str, Any] = {"dsnot": {"dsnot": {"init": "wanda"}}, "refit": {"refit": {"init": "wanda"}}}


def stages(row: str, pattern: str, ids: Path) -> list[dict[str, Any]]:
    """The stages of a row, evaluation left out."""
    if row == "dense":
        return []
    calibration = {"source": str(ids)}
    if row == "best":
        made: list[dict[str, Any]] = yaml.safe_load(BEST.read_text())["stages"]
        return [
            {name: {**settings, "calibration": calibration}}
            for stage in made
            for name, settings in stage.items()
            if name in {"permute", "prune"}
        ]
    found: list[dict[str, Any]] = []
    prune: dict[str, Any] = {"pattern": pattern, "calibration": calibration}
    for part in row.split("+"):
        if part == "permute":
            found.append({"permute": {"pattern": pattern, "calibration": calibration}})
        elif part == "reconstruct":
            prune["reconstruct"] = {}
        elif part == "gather":
            prune["gather"] = True
        elif part == "sequential":
            prune["order"] = "sequential"
        else:
            prune["method"] = SPECS.get(part, part)
    return [*found, {"prune": prune}]


def measure(row: str, pattern: str, ids: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Prune and evaluate; what came out."""
    evaluate = {"eval": {"source": options.data, "seqlen": options.eval_seqlen, "windows": options.windows}}
    model, result = options.model, {}
    if row.startswith("theirs:"):
        method = row.removeprefix("theirs:")
        out, saved = scratch / "theirs.json", scratch / "theirs"
        command = [options.reference_python, str(HERE / "reference.py"), "--repo", options.clones[method]]
        command += ["--model", str(options.folder), "--ids", str(ids), "--method", method, "--pattern", pattern]
        command += ["--dtype", options.dtype, "--out", str(out), "--save-model", str(saved)]
        _, peak, _ = run_process(command)
        facts = json.loads(out.read_text())
        model = str(saved)
        for path in options.folder.glob("tokenizer*"):  # their code saves none
            shutil.copy(path, saved)
        result = {"prune_seconds": facts["prune_seconds"], "peak_bytes": peak, "sparsity": facts["sparsity"]}
    recipe = {"model": model, "seed": 0, "stages": [*([] if result else stages(row, pattern, ids)), evaluate]}
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "compressllm", "run", str(scratch / "recipe.yaml"), str(scratch / "run"), "--json"]
    *made, measured = json.loads(run_process(command)[2])["stages"]
    for stage in made:
        result[f"{stage['stage']}_seconds"] = stage["seconds"]
        result["peak_bytes"] = max(result.get("peak_bytes", 0), stage["peak_memory_bytes"])
        if "sparsity" in stage["metrics"]:
            result |= {key: stage["metrics"][key] for key in ("sparsity", "masks_sha256")}
            errors = [row["error"] for row in stage["linears"] if "error" in row]
            result["mean_layer_error"] = sum(errors) / len(errors)
            result["fallbacks"] = sum("fallback" in row for row in stage["linears"])
    metrics = measured["metrics"]
    return {"row": row, "pattern": pattern, "perplexity": metrics["perplexity"], **result} | {
        "protocol": metrics["protocol"].replace(options.data, Path(options.data).name),
        "cpu": cpu_name(),
        "loadavg": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, RESULT)
    parser.add_argument("--patterns", default="2:4")
    parser.add_argument("--rows", default="dense,magnitude,wanda,ria,sparsegpt,admm,dsnot")
    parser.add_argument("--reference", action="append", default=[], help="METHOD=CLONE of the authors' code")
    parser.add_argument("--reference-python", default=sys.executable)
    parser.add_argument("--dtype", default="float32", help="dtype the authors' code computes in")
    parser.add_argument("--keep", type=Path, help="folder in which the models of rows stay")
    options = parser.parse_args()
    options.clones = dict(pair.split("=", 1) for pair in options.reference)

    bundle = open_bundle(options.model)
    options.folder = bundle.checkpoint.folder if bundle.checkpoint else None
    about = {
        "what": "WikiText-2 raw test perplexity, seconds and peak bytes of one-shot pruning",
        "command": "python benchmarks/one_shot.py --rows ROWS --patterns PATTERNS, see benchmarks/README.md",
    }
    keys = [
        {"row": row, "pattern": "dense" if row == "dense" else pattern}
        for pattern in options.patterns.split(",")
        for row in options.rows.split(",")
    ]

    def kept(row: str) -> Path | None:
        if options.keep is None:
            return None
        (options.keep / row).mkdir(parents=True, exist_ok=True)
        return Path(options.keep / row)

    def show(made: dict[str, Any]) -> str:
        seconds = {key: value for key, value in made.items() if key.endswith("seconds")}
        return f"{made['pattern']:6} {made['row']:28} {made['perplexity']:10.3f} {seconds}"

    measure_rows(
        options, bundle, about, keys,
        lambda key, ids, scratch: measure(key["row"], key["pattern"], ids, options, kept(key["row"]) or scratch), show,
    )  # fmt: skip


if __name__ == "__main__":
    main()
