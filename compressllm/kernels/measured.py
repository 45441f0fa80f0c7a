"""How fast each backend computes a linear on this machine: measured once, remembered on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressllm.core.atomic import write_json
from compressllm.core.cache import cache_folder
from compressllm.core.compute import cpu_name
from compressllm.core.pattern import SparsityPattern
from compressllm.core.protocols import BACKENDS, Backend
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.core.registry import build
from compressllm.kernels.timing import interleaved, past_caches, rotating

#: Numbers of tokens a linear is measured at; a larger number runs like the last.
TOKENS = (1, 4, 16, 64, 256, 1024)

#: Backend -> number of tokens -> seconds a call.
Seconds = Mapping[str, Mapping[int, float]]

_SECONDS = 0.15  # for each number of tokens
_COPIES = 100  # of one weight at most: to pack thousands of small ones takes longer than they are worth
_LONG = 0.25  # where a call takes this long, larger numbers of tokens are taken to behave alike


def measuring() -> bool:
    """Whether ``auto`` may measure; ``COMPRESSLLM_MEASURE=0`` has it go by the backends' ranks instead."""
    return os.environ.get("COMPRESSLLM_MEASURE", "1") != "0"


class Timings:
    """Seconds a call of backends, by shape, dtype and number of tokens, on this machine as it is set up now.

    The file they are remembered in is named after everything they depend on but the weight: processor or GPU, threads,
    torch, the kernels' source and the environment variables that steer them.

    Args:
        folder: Where to remember them; None takes the cache folder.
        say: Told, in one line, of each measurement before it is made; standard error unless given.
    """

    def __init__(self, folder: Path | None = None, say: Callable[[str], object] | None = None) -> None:
        self._folder, self._say = folder or cache_folder() / "timings", say or _to_stderr

    def of(self, weight: Tensor | QuantizedWeight, pattern: SparsityPattern, backends: Sequence[str]) -> Seconds:
        """Seconds a call of ``backends`` for weights like this one; measured together unless all are known."""
        path = self._folder / f"{_machine(weight.device)}.json"
        case = _case(weight, pattern)
        known = _read(path).get(case, {})
        if not set(backends) <= known.keys():
            self._say(f"measuring {', '.join(backends)} on {case}, once for this machine")
            known = measure(weight, pattern, backends)
            with contextlib.suppress(OSError):  # a cache that cannot be written is only slower
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**_read(path), case: known})
        return {name: {int(n): float(s) for n, s in known[name].items()} for name in backends}


def measure(
    weight: Tensor | QuantizedWeight, pattern: SparsityPattern, backends: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Median seconds a call at each of `TOKENS`, on random weights of the same kind, read from memory."""
    device, columns = weight.device, weight.shape[1]
    example, keep = example_like(weight, pattern)
    used: dict[str, Backend] = {name: build(BACKENDS, name) for name in backends}
    copies = {
        name: packed_past_caches(backend, example, keep, most=_COPIES, turns=len(used))[0]
        for name, backend in used.items()
    }
    found: dict[str, dict[int, float]] = {name: {} for name in backends}
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device=device).to(weight.dtype)
        with torch.inference_mode():
            calls = {
                name: rotating(functools.partial(linear_of(backend), x), copies[name]) for name, backend in used.items()
            }
            for name, times in interleaved(calls, _SECONDS, device).items():
                found[name][tokens] = statistics.median(times)
        if max(times[tokens] for times in found.values()) > _LONG:
            break
    return found


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def packed_past_caches(
    backend: Backend, weight: Tensor | QuantizedWeight, keep: Tensor, most: int | None = None, turns: int = 1
) -> tuple[list[dict[str, Tensor]], int]:
    """A weight packed as often as `past_caches` says; and the bytes of one.

    Packed one by one: a backend chooses the memory they lie in.
    """

    def pack() -> dict[str, Tensor]:  # the dense backend keeps the very tensor it is given
        return backend.pack(weight if isinstance(weight, QuantizedWeight) else weight.clone(), keep)

    return past_caches(pack, weight.device, most, turns)


def linear_of(backend: Backend) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    """What multiplies (..., in) activations by a weight that ``backend`` packed, to (..., out)."""
    return lambda x, packed: backend.linear(x, packed, None)


def example_like(weight: Tensor | QuantizedWeight, pattern: SparsityPattern) -> tuple[Tensor | QuantizedWeight, Tensor]:
    """A random weight of the same kind, and its mask."""
    values = torch.randn(weight.shape, device=weight.device)
    keep = pattern.keep(values.abs())
    values = values.masked_fill_(~keep, 0).bfloat16().to(weight.dtype)  # some backends hold no more than bfloat16
    if isinstance(weight, QuantizedWeight):
        return quantize_absmax(values, keep, weight.bits, weight.group), keep
    return values, keep


def _case(weight: Tensor | QuantizedWeight, pattern: SparsityPattern) -> str:
    """``4096x14336 int4/64 bfloat16 2:4``: what a timing depends on besides the machine."""
    kind = f"int{weight.bits}/{weight.group} " if isinstance(weight, QuantizedWeight) else ""
    return f"{weight.shape[0]}x{weight.shape[1]} {kind}{str(weight.dtype).removeprefix('torch.')} {pattern}"


def _machine(device: torch.device) -> str:
    """Name of the processor and a hash of everything else that timings depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    steering = {key: value for key, value in os.environ.items() if key.startswith("COMPRESSLLM_")}
    steering.pop("COMPRESSLLM_CACHE", None)
    facts = [name, torch.get_num_threads(), torch.__version__, _sources(), sorted(steering.items())]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return "".join(c if c.isalnum() else "-" for c in name) + "-" + digest


@functools.cache
def _sources() -> str:
    """Hash of the kernels' own source files, so that a changed kernel is measured anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in {".py", ".c", ".h", ".cu"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError):  # absent or damaged: measured anew
        return {}
    return read if isinstance(read, dict) else {}
