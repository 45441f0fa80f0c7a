"""Does the gate pass noise and fail a regression? Ten reseeded prunings, and the same with 2 % put in.

    python benchmarks/gate_noise.py

The measure is the model pruned with seed 0. Each of the others is pruned alike with a seed of its own, so calibrated
on other windows of the same text, and held against it as `compressllm compare --max-ppl-increase` does. Then noise is
put on the weights that each has kept, with a scale that is bisected until the perplexity of the text's first half is
2 % higher, and what comes of that is held against the measure as well. All is judged on the second half. Rows that the
result file has already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.calibration.windows import evaluation_windows
from compressllm.core.run import Run
from compressllm.eval.paired import paired_rise
from compressllm.eval.perplexity import Perplexity, perplexity
from compressllm.models.bundle import open_bundle
from compressllm.prune import PruneConfig, prune_model
from compressllm.report.compare import Contender, compare
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "gate_noise.json"


def pruned(options: argparse.Namespace, seed: int) -> tuple[PreTrainedModel, Any]:
    """The model pruned with a seed, in memory, and its masks."""
    config = PruneConfig(
        method=options.method,
        pattern=options.pattern,
        dtype=options.dtype,
        calibration={"source": options.calibration, "samples": options.samples, "seqlen": options.seqlen},
    )
    with tempfile.TemporaryDirectory() as folder:
        bundle = prune_model(open_bundle(options.model), config, Run(seed, Path(folder)))
        return bundle.live(torch.float32), bundle.masks


@torch.no_grad()
def disturb_(model: PreTrainedModel, masks: Any, scale: float, seed: int) -> None:
    """Put normal noise on the kept weights, ``scale`` of each linear's root mean square. In place."""
    draw = torch.Generator().manual_seed(seed)
    for name in sorted(masks):
        weight = model.get_submodule(name).weight
        noise = torch.randn(weight.shape, generator=draw)
        weight += scale * weight.pow(2).mean().sqrt() * noise * masks[name]


def regress_(model: PreTrainedModel, masks: Any, ids: Tensor, rise: float, seed: int) -> tuple[float, float]:
    """Disturb a model until its perplexity on ``ids`` is so much higher. In place; the scale, and what it gave."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, low, high = perplexity(model, ids).perplexity, 0.0, 0.5
    for _ in range(12):
        scale = (low + high) / 2
        model.load_state_dict(state)
        disturb_(model, masks, scale, seed)
        found = perplexity(model, ids).perplexity / before - 1
        low, high = (scale, high) if found < rise else (low, scale)
        if abs(found - rise) < rise / 50:
            break
    return scale, found


def contender(name: str, found: Perplexity) -> Contender:
    """A measurement, as `compare` reads one."""
    measured = {
        "perplexity": found.perplexity,
        "window_nll": list(found.window_nll),
        "windows": found.windows,
        "seqlen": found.seqlen,
        "dtype": found.dtype,
        "ids_sha256": "the same",
    }
    return Contender(name, [measured], {}, {})


def main() -> None:
    """Measure the rows that are missing, print them, and keep the JSON up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tests/tiny/model")
    parser.add_argument("--calibration", default="tests/tiny/calibration.txt")
    parser.add_argument("--data", default="tests/tiny/eval.txt")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a window, of either text")
    parser.add_argument("--windows", type=int, default=None, help="at most so many to measure on, halves together")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--allowed", type=float, default=0.01, help="rise that the gate lets pass")
    parser.add_argument("--rise", type=float, default=0.02, help="regression put in")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()

    bundle = open_bundle(options.model)
    windows = evaluation_windows(
        options.data, bundle.tokenizer, options.seqlen, options.windows,
        max_seqlen=bundle.max_seqlen, vocab_size=bundle.vocab_size,
    )  # fmt: skip
    half = len(windows) // 2
    first, second = windows.ids[:half], windows.ids[half:]
    about = {key: str(value) for key, value in vars(options).items() if key != "out"}
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    if record["results"] and record["about"] != about:
        raise SystemExit(f"{options.out}: was measured with other settings; name another file")
    record |= {
        "what": "verdicts of the gate on reseeded prunings, and on the same with a regression put in",
        "command": "python benchmarks/gate_noise.py, with what `about` says",
        "about": about,
        "windows": len(second),
        "environment": environment(),
    }
    done = {(row["seed"], row["put_in"]) for row in record["results"]}
    wanted = [seed for seed in range(1, options.seeds + 1) if not {(seed, False), (seed, True)} <= done]
    if "base_nll" not in record and wanted:
        record["base_nll"] = list(perplexity(pruned(options, 0)[0], second).window_nll)

    def judged(seed: int, model: PreTrainedModel, **facts: Any) -> None:
        found = perplexity(model, second)
        base = Perplexity(
            float(torch.tensor(record["base_nll"], dtype=torch.float64).mean().exp()), 0.0, 0, found.windows,
            found.seqlen, found.dtype, tuple(record["base_nll"]),
        )  # fmt: skip
        line = compare([contender("seed 0", base), contender(f"seed {seed}", found)], options.allowed).lines[1]
        rise = paired_rise(base.window_nll, found.window_nll)
        row = {"seed": seed, **facts, "perplexity": found.perplexity, "rise": rise._asdict(), "verdict": line.verdict}
        row |= {"window_nll": list(found.window_nll), "loadavg": os.getloadavg()[0]}
        row |= {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        record["results"].append(row)
        print(seed, facts, f"{rise.value:+.3%} {rise.low:+.3%} {rise.high:+.3%} {line.verdict}", flush=True)

    for seed in wanted:
        model, masks = pruned(options, seed)
        record["results"] = [row for row in record["results"] if row["seed"] != seed]
        judged(seed, model, put_in=False)
        scale, found = regress_(model, masks, first, options.rise, seed)
        judged(seed, model, put_in=True, scale=scale, rise_on_first_half=found)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
