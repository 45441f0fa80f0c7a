"""What a piece of work will need of the machine's memory, and what is left of it."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeed:
    """Memory that some work takes at its peak, on top of what the process has when it begins.

    Args:
        parts: What takes it -> bytes.
        lower: What the user can lower, in words.
    """

    parts: Mapping[str, int]
    lower: str

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        largest = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{count / 1e9:.1f} GB of {what}" for what, count in largest if count >= 0.05 * self.bytes)


def peak_of(phases: Mapping[str, Mapping[str, int]], lower: str) -> MemoryNeed:
    """The need of phases that come one after the other: that of the largest."""
    return MemoryNeed(max(phases.values(), key=lambda parts: sum(parts.values())), lower)


def available_bytes() -> int | None:
    """Memory that this process can still take without swapping; None where the system does not tell.

    The least of what the machine, the control group and the process's own limit leave.
    """
    left: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        left += [int(fields[1]) * 1024 for fields in lines if fields[0] == "MemAvailable:"]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        most = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        left.append(most - used + int(stat.get("inactive_file", 0)))  # what files left in memory can go
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            left.append(limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(left)) if left else None
