"""Seconds a token at batch 1 of drafting with few neurons, with and without correction, against the dense model.

    python benchmarks/contextual_speed.py --shapes smollm2-135m,llama-3.2-1b,llama-3.2-3b

Weights are random, so that what is generated means nothing: a corrected run lets as many drafted tokens stand as give
the mean advance of --advance (measured by contextual.py on a real model). Dense rows are transformers' forward
with its static cache, and the same with the cache that drafts use; all rows are timed in turn, round by round, and
ratios are of the median round to the faster dense row. Rows that the result file has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from shapes import SHAPES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compressllm.contextual.attach import Contextual
from compressllm.contextual.cache import DraftCache
from compressllm.contextual.calibrate import calibrate
from compressllm.contextual.decode import Decoding
from compressllm.contextual.density import break_even, read_density, suggest_period
from compressllm.contextual.fidelity import DENSE
from compressllm.core.protocols import Corrector
from compressllm.eval.decoding import Decoder
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "contextual_speed.json"
PROMPT = 64
#: Selector of each row, and its options.
SELECTORS: dict[str, Any] = {"griffin": "griffin", "cats": "cats", "teal": {"teal": {"allocation": "uniform"}}}


@dataclass
class Standing:
    """Lets as many drafted tokens stand as give a mean advance, whatever they are."""

    period: int
    advance: float
    width: int = 1
    exact: bool = False
    owed: float = field(default=0.0)

    def accepts(self, drafted: Tensor, logits: Tensor, best: Tensor) -> Tensor:
        """The first few."""
        self.owed += self.advance
        stand = max(0, min(len(drafted), round(self.owed) - 1))
        self.owed -= stand + 1
        return torch.arange(len(drafted)) < stand


def random_model(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a shape whose weights repeat a few million random numbers."""
    config = LlamaConfig(**SHAPES[shape], dtype=str(dtype).removeprefix("torch."))
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    values = (0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))).to(dtype)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        count = parameter.numel()
        data = (
            values.repeat(-(-count // len(values)))[:count] if parameter.dim() > 1 else torch.ones(count, dtype=dtype)
        )
        setattr(model.get_submodule(owner), leaf, nn.Parameter(data.view(parameter.shape), requires_grad=False))
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()


def by_transformers(model: PreTrainedModel, ids: Tensor, tokens: int) -> float:
    """Seconds a token with the static cache, prompt left out."""
    decoder = Decoder(model, ids.shape[1] + tokens)
    following = decoder.prefill(ids).argmax(-1, keepdim=True)
    begun = time.perf_counter()
    for _ in range(tokens):
        following = decoder.step(following).argmax(-1, keepdim=True)
    return (time.perf_counter() - begun) / tokens


def by_loop(contextual: Contextual, ids: Tensor, tokens: int, corrector: Corrector | None) -> float:
    """Seconds a token, prompt and gathering left out."""
    decoding = Decoding(contextual, ids, tokens + 1, corrector)
    for _ in decoding.spans():
        pass
    return decoding.counts.seconds / tokens


def check_costs(contextual: Contextual, ids: Tensor, repeats: int) -> dict[int, float]:
    """Cost of a dense pass of so many tokens over one of a single token, the best of some tries."""
    seconds: dict[int, float] = {}
    for count in (1, 2, 4, 8, 16):
        tried = []
        for _ in range(repeats):
            decoding = Decoding(contextual, ids, 32, DENSE)
            decoding.cache = DraftCache(contextual.model.config, ids.shape[1] + 32)
            with torch.inference_mode():
                decoding.forward(ids, 1)
                begun = time.perf_counter()
                decoding.check(ids[0, :count].tolist())
                tried.append(time.perf_counter() - begun)
        seconds[count] = min(tried)
    return {count: value / seconds[1] for count, value in seconds.items()}


def measure(shape: str, asked: argparse.Namespace) -> dict[str, Any]:
    """All rows of one shape."""
    dtype = getattr(torch, asked.dtype)
    model = random_model(shape, dtype)
    ids = torch.randint(10, 10000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    row: dict[str, Any] = {
        "shape": shape,
        "dtype": asked.dtype,
        "density": asked.density,
        "threads": torch.get_num_threads(),
    }
    seconds: dict[str, list[float]] = {}
    reads: dict[str, float] = {}
    for selector in asked.selectors.split(","):
        spec = SELECTORS.get(selector, selector)
        fitted = calibrate(model, spec, ids[:, :32]) if selector in ("cats", "teal") else {}
        contextual = Contextual(model, spec, asked.density, fitted)
        rows: dict[str, Callable[[], float]] = {
            "dense, static cache": lambda: by_transformers(model, ids, asked.tokens),
            "dense, draft cache": lambda c=contextual: by_loop(c, ids, asked.tokens, DENSE),
            f"{selector}": lambda c=contextual: by_loop(c, ids, asked.tokens, None),
        }
        if asked.advance:
            by = Standing(asked.period, asked.advance)
            rows[f"{selector}, corrected"] = lambda c=contextual, by=by: by_loop(c, ids, asked.tokens, by)
        for turn in range(asked.rounds + 1):  # the first warms up
            for name, timed in rows.items():
                value = timed()
                if turn:
                    seconds.setdefault(name, []).append(value)
        reads[selector] = read_density(contextual)
        if "check_cost" not in row:
            row["check_cost"] = check_costs(contextual, ids, asked.rounds)
        contextual.detach_()
        del contextual
    median = {name: statistics.median(values) for name, values in seconds.items()}
    dense = min(value for name, value in median.items() if name.startswith("dense"))
    known = row["check_cost"]
    cost = known.get(asked.period) or known[max(k for k in known if k <= asked.period)]
    row |= {
        "seconds_per_token": {name: sorted(values) for name, values in seconds.items()},
        "speedup": {name: dense / value for name, value in median.items()},
        "read_density": reads,
        "period": asked.period,
        "advance": asked.advance,
        "break_even_advance": {name: break_even(asked.period, read, cost) for name, read in reads.items()},
        "suggested_period": {
            name: suggest_period(asked.rate, read, lambda k: _between(known, k)) for name, read in reads.items()
        },
    }
    return row


def _between(known: dict[int, float], period: int) -> float:
    """The cost of a check between and beyond measured ones, linear."""
    below = max((k for k in known if k <= period), default=1)
    above = min((k for k in known if k >= period), default=below)
    if above == below:
        below, above = (8, 16) if period > 16 else (below, above)
    if above == below:
        return known[below]
    return known[below] + (known[above] - known[below]) * (period - below) / (above - below)


def main() -> None:
    """Measure the shapes that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2-135m,llama-3.2-1b,llama-3.2-3b")
    parser.add_argument("--selectors", default="griffin,cats,teal")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--period", type=int, default=8)
    parser.add_argument(
        "--advance", type=float, default=0.0, help="mean tokens of a corrected cycle; 0 leaves that out"
    )
    parser.add_argument("--rate", type=float, default=0.95, help="share of drafts that stand, for the suggested period")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true", help="measure shapes anew that are in the file")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    record: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {"results": []}
    for shape in asked.shapes.split(","):
        key = {"shape": shape, "dtype": asked.dtype, "density": asked.density, "period": asked.period}
        have = [row for row in record["results"] if key.items() <= row.items()]
        if have and not asked.again:
            continue
        row = measure(shape, asked)
        record |= {"environment": environment(), "command": "python benchmarks/contextual_speed.py"}
        record["results"] = [one for one in record["results"] if one not in have] + [row]
        print(shape, {name: round(value, 3) for name, value in row["speedup"].items()}, flush=True)
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
