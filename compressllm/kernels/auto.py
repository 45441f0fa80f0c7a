"""``auto``: from what was measured to a backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from compressllm.kernels.measured import Seconds

#: A backend may take this much longer than dense at some number of tokens and still be chosen.
ALLOWED = 1.05
#: Times at one token that differ by less are alike, as repeated measurements differ by that much; prompts then decide.
CLOSE = 1.1


@dataclass(frozen=True)
class Picked:
    """Outcome of a contest.

    Args:
        name: The winner.
        lost: Backend -> why it lost.
        dense_from: Number of tokens from which a dense copy is faster than the winner; None if it needs none.
    """

    name: str
    lost: Mapping[str, str] = field(default_factory=dict)
    dense_from: int | None = None


def pick(seconds: Seconds, dense: str = "dense", keep_dense: bool = False) -> Picked:
    """The backend that is fastest at one token, of those that are nowhere slower than dense by more than `ALLOWED`.

    Decoding decides, since that is where time goes; the bound is for prompts. Of backends about as fast as the fastest
    there, within `CLOSE`, that is taken which is fastest by the geometric mean over all numbers of tokens.

    Args:
        seconds: Backend -> number of tokens -> seconds a call; all at the same numbers, the smallest first.
        dense: Which of them the others must not be slower than; if it is not there, there is no bound.
        keep_dense: A backend may be slower from some number of tokens on, where a dense copy takes over.
    """
    lost: dict[str, str] = {}
    able: dict[str, int | None] = {}
    for name, times in seconds.items():
        slow = {} if dense not in seconds else {n: s / seconds[dense][n] for n, s in times.items()}
        slow = {n: ratio for n, ratio in slow.items() if ratio > ALLOWED}
        if not slow:
            able[name] = None
        elif keep_dense and list(slow) == [n for n in times if n >= min(slow)] and len(slow) < len(times):
            able[name] = min(slow)
        else:
            worst = max(slow, key=lambda n: slow[n])
            more = "" if len(slow) == len(times) else f"; it is slower at {_listed(slow)} tokens only"
            lost[name] = f"takes {slow[worst]:.2f} times as long as {dense} at {worst} tokens{more}"
    first = min(next(iter(seconds.values())))
    best = min(seconds[name][first] for name in able)
    close = [name for name in able if seconds[name][first] <= CLOSE * best]

    def overall(name: str) -> float:
        taken_over = able[name] or math.inf
        return math.prod(seconds[dense if n >= taken_over else name][n] for n in seconds[name])

    winner = min(close, key=overall)
    for name in able.keys() - {winner}:
        # Named is the number of tokens at which it lost.
        at = max(seconds[name], key=lambda n: seconds[name][n] / seconds[winner][n]) if name in close else first
        longer = seconds[name][at] / seconds[winner][at]
        lost[name] = f"takes {longer:.2f} times as long as {winner} at {at} token{'s' * (at > 1)}"
    return Picked(winner, lost, able[winner])


def _listed(numbers: Mapping[int, object]) -> str:
    return ", ".join(map(str, sorted(numbers)))
