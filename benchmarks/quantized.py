"""WikiText-2 perplexity and bytes of a dense model, the same at 2:4, and that quantised, all on the same token ids.

    python benchmarks/quantized.py --calibration c4 --data wikitext2 --rows dense,2:4,2:4+int8,2:4+int4-g128+rtn

A row is `dense` or a pattern, then `+SCHEME`, and then `+METHOD`: rtn, gptq (the default), gptq-natural (columns as
they come), awq-scale, awq-gptq (the scales, and then GPTQ), or joint (SparseGPT prunes the dense model and rounds in
one sweep). --pruned PATTERN=FOLDER starts from a checkpoint that is pruned already, and recovered perhaps, in place of
pruning with --method; there may be several of one pattern, PATTERN/NAME=FOLDER, whose rows are PATTERN/NAME+SCHEME.
Every row is a process of its own. Rows that the result file has already are not measured again, so a stopped run goes
on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from calibrated import add_options, measure_rows
from prune_speed import run_process

from compressllm.export.sizes import exported_sizes
from compressllm.models.bundle import open_bundle
from compressllm.models.checkpoint import Checkpoint
from compressllm.models.resolve import demo_gguf, resolve_model

HERE = Path(__file__).parent
RESULT = HERE / "results" / "quantized.json"
ROWS = (
    "dense,dense+int4-g128+rtn,dense+int4-g128,2:4,2:4+int8+rtn,2:4+int8,2:4+fp8+rtn,2:4+fp8,2:4+int8-dynamic,"
    "2:4+fp8-dynamic,2:4+int4-g128+rtn,2:4+int4-g128,2:4+int4-g128+awq-scale,2:4+int4-g128+awq-gptq"
)
METHODS = {
    "joint": {"rtn": {"fit": True}},
    "awq-gptq": {"awq-scale": {"then": "gptq"}},
    "gptq-natural": {"gptq": {"order": "natural"}},
}


def stages(row: str, ids: Path, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Where a row starts, and its stages, evaluation left out."""
    pattern, *rest = row.split("+")
    calibration = {"source": str(ids)}
    model, found = options.pruned.get(pattern, options.model), []
    method = rest[1] if len(rest) > 1 else "gptq"
    if method == "joint":
        joint = {"sparsegpt": {"quantize": rest[0]}}
        model, found = options.model, [{"prune": {"method": joint, "pattern": pattern, "calibration": calibration}}]
    elif pattern != "dense" and pattern not in options.pruned:
        found.append({"prune": {"method": options.method, "pattern": pattern, "calibration": calibration}})
    if rest:
        method = METHODS.get(method, method)
        found.append({"quantize": {"scheme": rest[0], "method": method, "calibration": calibration}})
    elif pattern != "dense":
        found.append({"export": {"format": "packed"}})
    return model, found


def measure(row: str, ids: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Prune, quantise and evaluate; what came out."""
    model, made = stages(row, ids, options)
    evaluate = {"source": options.data, "seqlen": options.eval_seqlen, "windows": options.windows}
    evaluate |= {"backend": options.backend, "dtype": options.dtype}
    (scratch / "recipe.yaml").write_text(
        yaml.safe_dump({"model": model, "seed": 0, "stages": [*made, {"eval": evaluate}]})
    )
    command = [sys.executable, "-m", "compressllm", "run", str(scratch / "recipe.yaml"), str(scratch / "run"), "--json"]
    *done, measured = json.loads(run_process(command)[2])["stages"]
    folder = scratch / "run" / "model" if made else resolve_model(model)
    checkpoint = Checkpoint(folder)
    sizes = exported_sizes(checkpoint)
    result: dict[str, Any] = {"row": row, "perplexity": measured["metrics"]["perplexity"]}
    result |= {"bytes": sum(path.stat().st_size for path in checkpoint.files), "linear_bytes": sizes.stored}
    result |= {"linear_ratio": sizes.ratio} if sizes.dense else {}
    for stage in done:
        result[f"{stage['stage']}_seconds"] = stage["seconds"]
        result |= {
            key: stage["metrics"][key] for key in ("masks_sha256", "mean_layer_error") if key in stage["metrics"]
        }
    pattern = row.split("+")[0].split("/")[0]
    if pattern != "dense":
        verify = [sys.executable, "-m", "compressllm", "verify", str(folder), "--pattern", pattern, "--json"]
        result["verified"] = json.loads(run_process(verify)[2])["ok"]
    return result | {
        "backends": measured["metrics"]["backends"]["linears"],
        "protocol": measured["metrics"]["protocol"].replace(options.data, Path(options.data).name),
        "loadavg": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sparsegpt", help="what prunes a pattern that --pruned does not give")
    parser.add_argument("--pruned", action="append", default=[], help="PATTERN=FOLDER of a pruned checkpoint")
    parser.add_argument("--backend", default="dense", help="what runs the sparse linears; dense rounds nothing more")
    parser.add_argument("--dtype", default="float32", help="dtype of the evaluation")
    parser.add_argument("--rows", default=ROWS)
    add_options(parser, RESULT)
    options = parser.parse_args()
    options.pruned = dict(pair.split("=", 1) for pair in options.pruned)

    bundle = open_bundle(options.model)
    bfloat16 = sum(spec.bytes * 2 // spec.dtype.itemsize for spec in bundle.checkpoint.specs.values())
    gguf = demo_gguf().stat().st_size if options.model == "demo" else None
    about = {
        "what": "WikiText-2 raw test perplexity and bytes of quantised sparse models",
        "command": "python benchmarks/quantized.py --rows ROWS, see benchmarks/README.md",
        "pruned": {pattern: Path(folder).name for pattern, folder in options.pruned.items()} or options.method,
        "dense_bytes": {"float32": 2 * bfloat16, "bfloat16": bfloat16} | ({"Q4_1, as it comes": gguf} if gguf else {}),
    }
    measure_rows(
        options, bundle, about, [{"row": row} for row in options.rows.split(",")],
        lambda key, ids, scratch: measure(key["row"], ids, options, scratch),
        lambda made: f"{made['row']:24} {made['perplexity']:10.3f} {made['bytes'] / 1e6:10.1f} MB",
    )  # fmt: skip


if __name__ == "__main__":
    main()
