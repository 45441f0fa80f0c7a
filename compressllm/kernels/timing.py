"""Time calls against each other in one process, so that what else runs on the machine hits all of them alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")

_LEAST_ROUNDS = 3
_MOST_ROUNDS = 400
_SHORTEST_TURN = 1e-3  # seconds; the clock and the switch from one call to the next vanish in a turn this long

#: What is timed lies in memory, as a model's weights do, if it is this much larger than the caches.
_PAST_CACHES = 3


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    least_rounds: int = _LEAST_ROUNDS,
) -> dict[str, list[float]]:
    """Seconds a call of each took, one value a round; all rounds together last about ``seconds``.

    A turn repeats a short call.

    Args:
        calls: Each is called once before, unmeasured.
        least_rounds: Run these whatever time they take.
    """
    turns = {}
    for name, call in calls.items():
        call()  # compiles, searches, fills caches
        repeats = max(1, round(_SHORTEST_TURN / max(seconds_of(call, device), 1e-7)))
        turns[name] = functools.partial(seconds_of, call, device, repeats)
    return in_rounds(turns, seconds, least_rounds)


def in_rounds(
    turns: Mapping[K, Callable[[], T]], seconds: float, least_rounds: int = _LEAST_ROUNDS
) -> dict[K, list[T]]:
    """What each turn returned, one value a round; every other round takes them in reverse order."""
    found: dict[K, list[T]] = {name: [] for name in turns}
    end = time.perf_counter() + seconds
    for done in range(_MOST_ROUNDS):
        for name in list(turns)[:: 1 if done % 2 else -1]:
            found[name].append(turns[name]())
        if done + 1 >= least_rounds and time.perf_counter() > end:
            break
    return found


def rotating(call: Callable[[object], object], over: Sequence[object]) -> Callable[[], object]:
    """A call that takes the next of ``over`` each time, so that none is still in a cache."""
    following = cycle(over)
    return lambda: call(next(following))


def spread(times: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(times)
    low, middle, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else ordered * 3
    return {"median": middle, "low": low, "high": high, "rounds": len(ordered)}


def ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """How many times as fast as ``to``: the median of the rounds' ratios, which drift of the machine leaves alone."""
    return statistics.median(other / own for own, other in zip(times, to, strict=True))


def working_set(device: torch.device, turns: int = 1) -> int:
    """Bytes to rotate over so that every read goes to memory: thrice the largest cache, at least 128 MB.

    Of ``turns`` calls that take turns each evicts what the others read, so together they rotate over that much. A
    cache of hundreds of megabytes, as servers have, would otherwise have each hold gigabytes.
    """
    if device.type == "cuda":
        cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    else:
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        cache = max((int(p.read_text().strip().removesuffix("K")) << 10 for p in sizes), default=0)
    return max(128 << 20, _PAST_CACHES * cache // turns)


def past_caches(
    make: Callable[[], T], device: torch.device, most: int | None = None, turns: int = 1
) -> tuple[list[T], int]:
    """What ``make`` makes, called until it takes up `working_set`; and the bytes of one.

    Args:
        make: Gives a tensor, or a collection or mapping of values that has tensors in it, in memory of its own.
        most: No more than so many.
        turns: How many calls take turns in what is timed.
    """
    copies = [make()]
    size = bytes_of(copies[0])
    while len(copies) * size < working_set(device, turns) and (most is None or len(copies) < most):
        copies.append(make())
    return copies, size


def bytes_of(held: Any) -> int:
    """Bytes of the tensors in a collection, or of the values of a mapping."""
    if isinstance(held, torch.Tensor):
        return held.nbytes
    parts = held.values() if isinstance(held, Mapping) else held
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds a call took, the mean of so many in a row."""
    _wait(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - begun) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
