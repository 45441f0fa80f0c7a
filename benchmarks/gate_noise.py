"""Does the gate pass noise and fail a regression? Ten reseeded prunings, and ten with 2 % put in.

    python benchmarks/gate_noise.py

The measure is the model pruned with seed 0. A reseeded one is pruned alike with another seed, so calibrated on other
windows of the same text. For a regression, noise is put on the weights that the measure has kept, drawn by another seed
each time, with a scale at which perplexity is 2 % higher. Both are held against the measure as `compressllm compare
--max-ppl-increase` does. Rows that the result file has already are not measured again.
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


def regress_(model: PreTrainedModel, masks: Any, ids: Tensor, before: float, rise: float, seed: int) -> float:
    """Disturb a model until its perplexity on ``ids`` is so much over ``before``. In place; returns the scale.

    A small disturbance costs as its square, so a few steps suffice.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale = 0.1
    for _ in range(10):
        model.load_state_dict(state)
        disturb_(model, masks, scale, seed)
        found = perplexity(model, ids).perplexity / before - 1
        if abs(found - rise) < rise / 50:
            return scale
        scale *= min(2.0, max(0.5, (rise / found) ** 0.5)) if found > 0 else 2.0
    raise SystemExit(f"seed {seed}: no scale gives a rise of {rise:.1%}; the last, {scale:.3f}, gives {found:.2%}")


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
    parser.add_argument("--windows", type=int, default=None, help="at most so many to measure on")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--kinds", default="reseeded,regressed")
    parser.add_argument("--allowed", type=float, default=0.01, help="rise that the gate lets pass")
    parser.add_argument("--rise", type=float, default=0.02, help="regression put in")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()

    bundle = open_bundle(options.model)
    windows = evaluation_windows(
        options.data, bundle.tokenizer, options.seqlen, options.windows,
        max_seqlen=bundle.max_seqlen, vocab_size=bundle.vocab_size,
    )  # fmt: skip
    about = {key: str(value) for key, value in vars(options).items() if key not in ("out", "seeds", "kinds")}
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": []}
    if record["results"] and record["about"] != about:
        raise SystemExit(f"{options.out}: was measured with other settings; name another file")
    record |= {
        "what": "verdicts of the gate on reseeded prunings, and on a model with a regression put in",
        "command": "python benchmarks/gate_noise.py, with what `about` says",
        "about": about,
        "windows": len(windows),
        "environment": environment(),
    }
    done = {(row["kind"], row["seed"]) for row in record["results"]}
    wanted = [(kind, seed) for seed in range(1, options.seeds + 1) for kind in options.kinds.split(",")]
    wanted = [one for one in wanted if one not in done]
    if not wanted:
        return
    model, masks = pruned(options, 0)
    base = perplexity(model, windows.ids)
    record["base"] = {"perplexity": base.perplexity, "window_nll": list(base.window_nll)}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind, seed in wanted:
        facts: dict[str, Any] = {}
        if kind == "reseeded":
            other, _ = pruned(options, seed)
        else:
            model.load_state_dict(state)
            facts["scale"] = regress_(model, masks, windows.ids, base.perplexity, options.rise, seed)
            other = model
        found = perplexity(other, windows.ids)
        line = compare([contender("measure", base), contender(f"{kind} {seed}", found)], options.allowed).lines[1]
        assert line.rise is not None
        row = {"kind": kind, "seed": seed, **facts, "perplexity": found.perplexity, "rise": line.rise._asdict()}
        row |= {"verdict": line.verdict, "window_nll": list(found.window_nll), "loadavg": os.getloadavg()[0]}
        row |= {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        record["results"].append(row)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
        rise = line.rise
        print(f"{kind} {seed}: {rise.value:+.2%} ({rise.low:+.2%} to {rise.high:+.2%}) {line.verdict}", flush=True)


if __name__ == "__main__":
    main()
