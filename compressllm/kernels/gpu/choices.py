"""What was found fastest on this GPU: measured once, remembered on disk."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compressllm.core.atomic import write_json
from compressllm.core.cache import cache_folder

#: ``0``: nothing is searched; ``1``: whatever can be is; else only what has no good default.
SEARCH = "COMPRESSLLM_SEARCH"


class Choices:
    """Case -> the integers that stand for its fastest variant, on one GPU with these versions.

    Args:
        kind: First part of the file's name.
        facts: What all choices depend on: GPU, versions of libraries. Another set of facts is another file.
        always: Search unless told not to, instead of only if told to.
    """

    def __init__(self, kind: str, facts: Mapping[str, Hashable], always: bool) -> None:
        facts = {**facts, "torch": torch.__version__}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        self.path: Path = cache_folder() / "gpu" / f"{kind}-{digest}.json"
        self._facts, self._always = facts, always
        self._known: dict[str, tuple[int, ...]] | None = None

    def get(self, case: str, search: Callable[[], Sequence[int]], default: Sequence[int]) -> tuple[int, ...]:
        """The remembered choice; else what ``search`` finds, which is then remembered; else the default.

        Nothing is searched while a CUDA graph is captured: run once before capturing.
        """
        if self._known is None:
            self._known = self._read()
        if case in self._known:
            return self._known[case]
        wish = os.environ.get(SEARCH)
        if wish == "0" or not (self._always or wish == "1"):
            return tuple(default)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            warnings.warn(
                f"{case}: its fastest variant was not searched before a CUDA graph was captured; run it once first",
                stacklevel=2,
            )
            return tuple(default)
        found = tuple(int(number) for number in search())
        self._known = {**self._read(), **self._known, case: found}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"facts": self._facts, "choices": self._known})
        except OSError as error:
            warnings.warn(f"{self.path}: cannot be written ({error}); {case} is searched again next time", stacklevel=2)
        return found

    def _read(self) -> dict[str, tuple[int, ...]]:
        try:
            text = self.path.read_text()
        except OSError:
            return {}
        try:
            choices = json.loads(text)["choices"]
            return {str(case): tuple(int(number) for number in found) for case, found in choices.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            warnings.warn(f"{self.path}: is damaged and is measured anew", stacklevel=3)
            return {}


def bucket(tokens: int, least: int) -> int:
    """The next power of two, but at least ``least``; past 1024 the next multiple of 1024."""
    if tokens > 1024:
        return -(-tokens // 1024) * 1024
    return max(least, 1 << (tokens - 1).bit_length())


def fastest(calls: Sequence[Callable[[], Tensor]], rounds: int = 15) -> int:
    """Which call takes the least GPU time, by medians of interleaved rounds, nothing in its L2 cache.

    Overwriting the cache takes longer than launching what comes after it, so launches are not timed.
    """
    size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.empty(max(size, 1 << 28), dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # compiles, allocates
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            other.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
    medians = [statistics.median(taken) for taken in times]
    return medians.index(min(medians))
