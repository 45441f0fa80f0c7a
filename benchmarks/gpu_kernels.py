"""2:4 linears on a GPU against the best dense ones, on the shapes of Llama-3-8B.

Every contender runs in a CUDA graph that goes through as many copies of its weight as fill the L2 cache three times,
so launches cost nothing and weights come from memory; contenders take turns, round by round. Whatever one must do to
its activations (rounding them to 8 bits, filling up tokens) is part of it, compiled. A row gives seconds a call,
``speedup`` over dense bfloat16, ``speedup_best_dense`` over the fastest dense contender of its own and of the
16-bit format, bytes of the weight read a second as a share of the measured copy bandwidth, and how far the result is
from that of the unrounded weight.

    python benchmarks/gpu_kernels.py --out benchmarks/results/gpu_kernels.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from compressllm.core.pattern import NM
from compressllm.core.protocols import BACKENDS, Backend
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.core.registry import build
from compressllm.kernels.cusparselt import CuSparseLt, notes
from compressllm.stages.environment import environment

RESULT = Path(__file__).parent / "results" / "gpu_kernels.json"
LLAMA_8B = "4096x4096,1024x4096,14336x4096,4096x14336"  # q and o; k and v; gate and up; down
PATTERN = NM(2, 4)
GROUP = 128
ROUNDS = 25


class Contender(NamedTuple):
    """``call(x)`` for each copy of the weight, and the bytes of one."""

    calls: list[Callable[[Tensor], Tensor]]
    bytes: int
    dense: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=LLAMA_8B, help="outputs x inputs")
    parser.add_argument("--tokens", default="1,4,16,256,4096")
    parser.add_argument("--formats", default="bf16,fp8,int8,int4")
    parser.add_argument("--backends", default="cusparselt,sparse-mma,triton")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench-gpu: needs a CUDA device; this machine or this build of torch has none", file=sys.stderr)
        return 2
    torch._dynamo.config.recompile_limit = 1024  # one for each contender, shape and number of tokens
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/gpu_kernels.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "cusparselt": torch.backends.cusparselt.version(),
        "notes": notes(device),
        "copy_bytes_per_second": bandwidth,
        "rounds": options.rounds,
        "rows": [],
    }
    for shape in (tuple(int(n) for n in text.split("x")) for text in options.shapes.split(",")):
        for form in options.formats.split(","):
            made, refused = contenders(shape, form, options.backends.split(","), device)
            for tokens in map(int, options.tokens.split(",")):
                torch.compiler.reset()
                found = compare(made, refused, shape, form, tokens, options.rounds, bandwidth)
                result["rows"] += found
                show(found)
            write(options.out, result)
    return 0


def write(path: Path, result: dict[str, Any]) -> None:
    """Keep what there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def contenders(
    shape: tuple[int, int], form: str, backends: list[str], device: torch.device
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Name -> contender, with dense bfloat16 the first; and name -> why it is not there."""
    weight = torch.randn(shape, device=device) / shape[1] ** 0.5
    keep = PATTERN.keep(weight.abs())
    weight = weight.masked_fill_(~keep, 0).bfloat16()
    made, refused = {"dense bf16": dense(weight, functional.linear)}, {}
    if form == "fp8":
        made["dense fp8"] = dense(weight, compiled(scaled_fp8), lambda w: w.to(torch.float8_e4m3fn))
        packable: Tensor | QuantizedWeight = weight.to(torch.float8_e4m3fn)
    elif form == "int8":
        packable = codes = quantize_absmax(weight, keep, 8, shape[1])
        made["dense int8"] = dense((codes.codes, codes.scales.view(1, -1)), compiled(scaled_int8))
    elif form == "int4":
        packable = codes = quantize_absmax(weight, keep, 4, GROUP)
        try:
            made["dense int4"] = dense(int4_packed(codes), packed_int4)
        except RuntimeError as error:
            refused["dense int4"] = first_line(error)
    else:
        packable = weight
    for name in backends:
        backend = build(BACKENDS, name)
        if reason := backend.refuses(packable, PATTERN, wanted=True):
            refused[name] = reason
        else:
            made[f"{name} {form}"] = sparse(backend, packable, keep)
    return made, refused


def dense(weight: Any, product: Callable[..., Tensor], convert: Callable[[Tensor], Tensor] = lambda w: w) -> Contender:
    first = tuple(convert(part) for part in (weight if isinstance(weight, tuple) else (weight,)))
    size = sum(part.nbytes for part in first)
    parts = [tuple(part.clone() for part in first) for _ in range(copies(size, first[0].device))]
    return Contender([functools.partial(_product, product, each) for each in parts], size, dense=True)


def _product(product: Callable[..., Tensor], parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return product(x, *parts)


def sparse(backend: Backend, weight: Tensor | QuantizedWeight, keep: Tensor) -> Contender:
    packed = backend.pack(weight, keep)
    size = sum(tensor.nbytes for tensor in packed.values())
    parts = [{name: tensor.clone() for name, tensor in packed.items()} for _ in range(copies(size, keep.device))]
    eight = isinstance(weight, QuantizedWeight) or weight.dtype.itemsize == 1
    call = compiled(backend.linear) if eight and isinstance(backend, CuSparseLt) else backend.linear
    return Contender([functools.partial(call, packed=each, bias=None) for each in parts], size, dense=False)


def copies(size: int, device: torch.device) -> int:
    """How many fill the L2 cache three times, at least two."""
    return max(2, -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // size))


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def scaled_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """Tokens rounded to fp8 with a scale each, cuBLAS's scaled product."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 448).clamp(min=2.0**-100)
    small = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    ones = torch.ones(1, len(weight), device=x.device)
    return torch._scaled_mm(small, weight.T, scale, ones, out_dtype=torch.bfloat16)


def scaled_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Tokens rounded to int8 with a scale each; torch's product wants more than 16 of them."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=2.0**-100)
    small = (x / scale).round().to(torch.int8)
    return (torch._int_mm(small, codes.T) * scale * scales).to(x.dtype)


def int4_packed(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """What torch's int4 product for bfloat16 takes: codes from 0, and scales with the value that stands for 8."""
    pairs = (weight.codes + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs[:, ::2] << 4 | pairs[:, 1::2], 8)
    scales = weight.scales.T.bfloat16()
    return packed, torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()


def packed_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def compare(
    made: dict[str, Contender],
    refused: dict[str, str],
    shape: tuple[int, int],
    form: str,
    tokens: int,
    rounds: int,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Rows of one shape, format and number of tokens."""
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
    expected = made["dense bf16"].calls[0](x).float()
    graphs, errors, unable = {}, {}, dict(refused)
    for name, contender in made.items():
        try:
            errors[name] = float((contender.calls[0](x).float() - expected).norm() / expected.norm())
            graphs[name] = captured(contender, x)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            unable[name] = first_line(error)
    times = {name: statistics.quantiles(found, n=4) for name, found in in_turns(graphs, made, rounds).items()}
    median = {name: quartiles[1] for name, quartiles in times.items()}
    best = min(seconds for name, seconds in median.items() if made[name].dense)
    about = {"shape": f"{shape[0]}x{shape[1]}", "format": form, "tokens": tokens}
    rows = [
        about
        | {
            "backend": name,
            "seconds": median[name],
            "low": quartiles[0],
            "high": quartiles[2],
            "speedup": median["dense bf16"] / median[name],
            "speedup_best_dense": best / median[name],
            "bandwidth_share": made[name].bytes / median[name] / bandwidth,
            "relative_error": errors[name],
        }
        for name, quartiles in times.items()
    ]
    return rows + [about | {"backend": name, "refused": reason} for name, reason in unable.items()]


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def captured(contender: Contender, x: Tensor) -> torch.cuda.CUDAGraph:
    """A graph of one call with each copy of the weight."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in contender.calls:
            call(x)  # compiles, searches
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in contender.calls:
            call(x)
    return graph


def in_turns(
    graphs: dict[str, torch.cuda.CUDAGraph], made: dict[str, Contender], rounds: int
) -> dict[str, list[float]]:
    """Seconds a call, one number a round."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 2):
        for name in list(graphs)[:: 1 if number % 2 else -1]:
            seconds = timed(graphs[name].replay, repeats=10) / len(made[name].calls)
            times[name] += [seconds] if number >= 2 else []  # the first ones warm the clocks up
    return times


def timed(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, the mean of so many in a row, by the GPU's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy within the GPU's memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), repeats=5) for _ in range(5))


def show(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    for row in rows:
        head = f"{row['shape']:>11} {row['format']:>5} {row['tokens']:>5}  {row['backend']:<16}"
        if "refused" in row:
            print(f"{head} {row['refused']}", flush=True)
        else:
            print(
                f"{head} {row['seconds'] * 1e6:9.1f} us  x{row['speedup']:.2f}"
                f"  best dense x{row['speedup_best_dense']:.2f}"
                f"  bandwidth {row['bandwidth_share']:4.0%}  error {row['relative_error']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
