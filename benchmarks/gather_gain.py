"""What a gather at run time is worth: N:M in an order of inputs that each linear has to itself.

    python benchmarks/gather_gain.py --calibration c4 --data wikitext2 --rows wanda,admm

`permute` makes only those orders that cost nothing when the model runs; a row that begins with `permute+` is permuted
first. Each is pruned to 2:4 in the order that it then has, and with `gather: true`, live in float32. Rows that the
result file has already are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from calibrated import add_options, measure_rows

from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.prune.config import PermuteConfig, PruneConfig
from compressllm.prune.model import prune_model
from compressllm.prune.permute import permute_model
from compressllm.stages.evaluate import measure as measure_model

RESULT = Path(__file__).parent / "results" / "gather_gain.json"


def measure(key: Mapping[str, Any], ids: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prune and evaluate a row; what came out."""
    *before, method = str(key["row"]).split("+")
    opened, run = open_bundle(options.model), Run()
    bundle = Bundle(opened.live(torch.float32), opened.tokenizer)
    calibration = {"source": str(ids)}
    if before == ["permute"]:
        permute_model(bundle, PermuteConfig(pattern="2:4", calibration=calibration), run)
    prune_model(bundle, PruneConfig(method=method, pattern="2:4", gather=key["gathered"], calibration=calibration), run)
    config = EvalConfig(
        source=options.data, seqlen=options.eval_seqlen, windows=options.windows, dtype="float32", backend="dense"
    )
    found = measure_model(bundle, config, run)
    return {**key, "perplexity": found["perplexity"], "date": datetime.now(UTC).isoformat(timespec="seconds")}


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, RESULT)
    parser.add_argument("--rows", default="wanda,permute+wanda,admm,permute+admm")
    options = parser.parse_args()
    about = {
        "what": "perplexity at 2:4 in an order of inputs of each linear's own, and in the order as it came",
        "command": "python benchmarks/gather_gain.py --calibration C4 --data WIKITEXT --rows ROWS",
    }
    keys = [{"row": row, "gathered": gathered} for row in options.rows.split(",") for gathered in (False, True)]
    measure_rows(
        options, open_bundle(options.model), about, keys,
        lambda key, ids, _: measure(key, ids, options),
        lambda made: f"{made['row']:16} gathered {made['gathered']!s:5} {made['perplexity']:.3f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
