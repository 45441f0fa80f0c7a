"""Tokens a second of an 8B-shaped model on a GPU, dense and with every linear of its blocks at 2:4.

Weights are random, so this says nothing about quality. Decoding is transformers' own forward on a static cache,
compiled into a CUDA graph a step, or with ``--eager`` captured into one as it is; a prompt runs eagerly. All variants
are measured in one process, one after the other. Compiling takes about a minute for each variant and batch size.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import GROUP, PATTERN, timed, write
from shapes import SHAPES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.kernels.linear import SparseLinear, choose_backend
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "gpu_decode.json"
LLAMA_8B = SHAPES["llama-3-8b"]
PROMPT, ROUNDS = 2048, 20
CONTEXT = 256  # tokens in the cache while decoding
Pack = Callable[[Tensor, Tensor], "Tensor | QuantizedWeight"]
VARIANTS: dict[str, tuple[str, Pack]] = {
    "cusparselt bf16": ("cusparselt", lambda weight, keep: weight),
    "sparse-mma bf16": ("sparse-mma", lambda weight, keep: weight),
    "cusparselt fp8": ("cusparselt", lambda weight, keep: weight.to(torch.float8_e4m3fn)),
    "sparse-mma fp8": ("sparse-mma", lambda weight, keep: weight.to(torch.float8_e4m3fn)),
    "sparse-mma int8": ("sparse-mma", lambda weight, keep: quantize_absmax(weight, keep, 8, weight.shape[1])),
    "sparse-mma int4": ("sparse-mma", lambda weight, keep: quantize_absmax(weight, keep, 4, GROUP)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--eager", action="store_true", help="capture the step without compiling it")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench-gpu: needs a CUDA device; this machine or this build of torch has none", file=sys.stderr)
        return 2
    torch._dynamo.config.recompile_limit = 1024
    shape, batches = LLAMA_8B | {"num_hidden_layers": options.layers}, [int(n) for n in options.batches.split(",")]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/gpu_decode.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "model": f"Llama-3-8B's shape with {options.layers} blocks, random weights, 2:4 in all linears of the blocks",
        "context": CONTEXT,
        "prompt": PROMPT,
        "step": "captured as it is" if options.eager else "compiled",
        "rows": [measure("dense bf16", random_model(shape), batches, options.eager)],
    }
    for name in options.variants.split(","):
        model = random_model(shape)
        try:
            swap_(model, *VARIANTS[name])
        except BackendUnavailableError as error:
            result["rows"].append({"variant": name, "refused": str(error)})
        else:
            result["rows"].append(measure(name, model, batches, options.eager, result["rows"][0]))
        del model
        write(options.out, result)
    return 0


def random_model(shape: dict[str, Any], device: str = "cuda") -> Any:
    """In bfloat16, made on the device; its blocks' linears 2:4."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for linear in linears(model).values():
        linear.weight.data.masked_fill_(~PATTERN.keep(linear.weight.abs()), 0)
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the decoder's blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def swap_(model: nn.Module, backend: str, pack: Pack) -> None:
    """Replace the blocks' linears. Changes ``model`` in place. Raises BackendUnavailableError."""
    for name, linear in linears(model).items():
        keep = linear.weight != 0
        owner, _, leaf = name.rpartition(".")
        weight = pack(linear.weight.data, keep)
        choose_backend(weight, PATTERN, backend)
        setattr(model.get_submodule(owner), leaf, SparseLinear(weight, keep, linear.bias, PATTERN, backend))


@torch.inference_mode()
def measure(
    name: str, model: Any, batches: list[int], eager: bool, dense: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Median tokens a second, decoding at each batch size and reading a prompt; memory of the weights."""
    begun = time.perf_counter()
    row: dict[str, Any] = {"variant": name, "weight_bytes": weight_bytes(model), "decode": {}}
    for batch in batches:
        torch.compiler.reset()  # graphs of other variants would hold their weights
        step = decoding_step(model, batch, eager)
        row["decode"][batch] = batch / statistics.median(timed(step, repeats=5) for _ in range(ROUNDS))
    row["prefill"] = prefill(model)
    if dense:
        row["decode_speedup"] = {batch: row["decode"][batch] / dense["decode"][batch] for batch in batches}
        row["prefill_speedup"] = row["prefill"] / dense["prefill"]
    print(json.dumps(row), f"({time.perf_counter() - begun:.0f} s)", flush=True)
    return row


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def decoding_step(model: Any, batch: int, eager: bool) -> Callable[[], object]:
    """One token for each sequence of a batch, captured in a CUDA graph."""
    cache = StaticCache(config=model.config, max_cache_len=2 * CONTEXT)
    device = model.device
    prompt = torch.zeros(batch, CONTEXT, dtype=torch.long, device=device)
    model(prompt, past_key_values=cache, use_cache=True, cache_position=torch.arange(CONTEXT, device=device))
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    where = {
        "cache_position": torch.tensor([CONTEXT], device=device),
        "position_ids": torch.full((batch, 1), CONTEXT, device=device),
    }
    if eager:
        return captured_step(lambda: model(token, past_key_values=cache, use_cache=True, **where))
    forward = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead", dynamic=False)

    def step() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(token, past_key_values=cache, use_cache=True, **where)

    for _ in range(4):
        step()
    return step


def captured_step(step: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def prefill(model: Any) -> float:
    """Tokens a second of one prompt, without a cache."""
    ids = torch.zeros(1, PROMPT, dtype=torch.long, device=model.device)

    def run() -> object:
        return model(ids, use_cache=False, logits_to_keep=1)

    for _ in range(3):
        run()
    return PROMPT / statistics.median(timed(run, repeats=2) for _ in range(ROUNDS // 2))


if __name__ == "__main__":
    sys.exit(main())
