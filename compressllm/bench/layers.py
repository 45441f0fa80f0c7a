"""Single linears of random weights, by every backend that runs them and by torch, dense."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressllm.bench.bandwidth import BYTES, reading
from compressllm.bench.baselines import Baseline, at_least_as_exact, baselines
from compressllm.core.errors import BackendUnavailableError, RecipeError
from compressllm.core.pattern import NM, SparsityPattern
from compressllm.core.protocols import BACKENDS, Backend
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.core.registry import build
from compressllm.kernels.linear import AUTO, PLAIN, Choice, choose_backend
from compressllm.kernels.measured import Timings, example_like, linear_of, measuring, packed_past_caches
from compressllm.kernels.timing import interleaved, past_caches, ratio, rotating, spread

#: Formats a sparse weight may be in -> bits of its values.
SPARSE_FORMATS = {"bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class LayerBench:
    """What to measure.

    Args:
        shapes: (out, in) of each linear.
        tokens: Rows of the activations.
        formats: Of `SPARSE_FORMATS`.
        pattern: What the sparse weights obey.
        group: Inputs that share a scale, in int8 and int4.
        backends: Names; ``auto`` stands for all but dense that do not refuse, and has its choice reported.
        seconds: For each shape and number of tokens.
    """

    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[int] = (1, 16)
    formats: Sequence[str] = ("bf16",)
    pattern: SparsityPattern = field(default_factory=lambda: NM(2, 4))
    group: int = 64
    backends: Sequence[str] = (AUTO,)
    seconds: float = 1.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in SPARSE_FORMATS:
                raise RecipeError(f"unknown format {name!r}; known: {', '.join(SPARSE_FORMATS)}")
        for name in self.backends:
            if name != AUTO:
                BACKENDS.get(name)  # a name that is none is found before the work
        for shape in self.shapes:
            if reason := self.pattern.refuses(shape):
                raise RecipeError(f"{shape[0]}x{shape[1]}: {reason}")


@dataclass(frozen=True)
class _Contender:
    """One way to compute the linear, in as many copies as go past the caches."""

    label: str
    format: str
    linear: Callable[[Tensor, Any], Tensor]
    copies: Sequence[Any]
    bytes: int


def bench_layers(bench: LayerBench) -> Iterator[dict[str, Any]]:
    """One mapping for each shape and number of tokens, as it is measured.

    Each has ``rows``, one a format and backend; ``dense``, one a function of torch; ``refused``, format and backend ->
    why it does not run; and ``auto``, format -> what `choose_backend` chose. In a row ``speedup`` is over torch's
    bfloat16 linear; ``speedup_best_dense`` over the best of torch's dense linears that keep as much of the weight (to
    int4 weights all of them, to bf16 weights bf16 and fp32); both are medians of the ratios within a round.
    ``bandwidth_share`` is the rate at which the weight was read over the rate at which memory can be read, measured in
    the same rounds.

    Raises: BackendUnavailableError if a backend asked for by name can run nothing of it.
    """
    dense = baselines(bench.device, bench.group)
    for shape in bench.shapes:
        weights, keep = _weights(bench, shape)
        chosen = {
            form: asdict(_auto(weight, bench.pattern)) for form, weight in weights.items() if AUTO in bench.backends
        }
        turns = len(dense) + len(bench.formats)  # at the least: some formats have several backends
        rivals = [_dense(one, shape, bench.device, turns) for one in dense]
        contenders, refused = _sparse(bench, weights, keep, turns)
        for tokens in bench.tokens:
            yield _measured(bench, shape, tokens, rivals, contenders) | {"refused": refused, "auto": chosen}


def _measured(
    bench: LayerBench,
    shape: tuple[int, int],
    tokens: int,
    rivals: Sequence[_Contender],
    contenders: Sequence[_Contender],
) -> dict[str, Any]:
    x = torch.randn(tokens, shape[1], device=bench.device).to(torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {"read": reading(bench.device)}
    for one in (*rivals, *contenders):
        calls[one.label] = rotating(functools.partial(one.linear, x), one.copies)
    with torch.inference_mode():
        times = interleaved(calls, bench.seconds, bench.device)

    def row(one: _Contender) -> dict[str, Any]:
        equals = [rival for rival in rivals if rival.format in at_least_as_exact(one.format)]
        best = min(equals, key=lambda rival: spread(times[rival.label])["median"])
        took = spread(times[one.label])
        return {
            "shape": list(shape),
            "tokens": tokens,
            "format": one.format,
            "backend": one.label.partition(" ")[2],
            "speedup": ratio(times[one.label], to=times["bf16 linear bfloat16"]),
            "speedup_best_dense": ratio(times[one.label], to=times[best.label]),
            "best_dense": best.label.partition(" ")[2],
            "bandwidth_share": ratio(times[one.label], to=times["read"]) * one.bytes / BYTES,
            "seconds": took,
            "bits_per_weight": 8 * one.bytes / (shape[0] * shape[1]),
        }

    return {
        "rows": [row(one) for one in contenders],
        "dense": [row(one) for one in rivals],
        "read_bytes_per_second": BYTES / min(times["read"]),
    }


def _dense(baseline: Baseline, shape: tuple[int, int], device: torch.device, turns: int) -> _Contender:
    weight = torch.randn(shape, device=device).to(torch.bfloat16)
    copies, size = past_caches(functools.partial(baseline.pack, weight), device, turns=turns)
    return _Contender(f"{baseline.format} {baseline.name}", baseline.format, baseline.linear, copies, size)


def _weights(bench: LayerBench, shape: tuple[int, int]) -> tuple[dict[str, Tensor | QuantizedWeight], Tensor]:
    """Format -> the sparse weight in it, and their mask."""
    plain, keep = example_like(torch.empty(shape, dtype=torch.bfloat16, device=bench.device), bench.pattern)
    weights: dict[str, Tensor | QuantizedWeight] = {}
    for form in bench.formats:
        weights[form] = plain
        if SPARSE_FORMATS[form] < 16 and isinstance(plain, Tensor):
            weights[form] = quantize_absmax(plain, keep, SPARSE_FORMATS[form], bench.group)
    return weights, keep


def _auto(weight: Tensor | QuantizedWeight, pattern: SparsityPattern) -> Choice:
    return choose_backend(weight, pattern, timings=Timings() if measuring() else None)


def _sparse(
    bench: LayerBench, weights: Mapping[str, Tensor | QuantizedWeight], keep: Tensor, turns: int
) -> tuple[list[_Contender], dict[str, str]]:
    """Those that run, and format and backend -> why the others do not."""
    named = [name for name in bench.backends if name != AUTO]
    others = [name for name in BACKENDS.names() if name not in {PLAIN, *named}] if AUTO in bench.backends else []
    found, refused = [], {}
    for form, weight in weights.items():
        for name in named + others:
            backend: Backend = build(BACKENDS, name)
            if reason := backend.refuses(weight, bench.pattern, wanted=name in named):
                refused[f"{form} {name}"] = reason
                continue
            copies, size = packed_past_caches(backend, weight, keep, turns=turns)
            found.append(_Contender(f"{form} {name}", form, linear_of(backend), copies, size))
    if not found and not others:
        raise BackendUnavailableError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return found, refused
