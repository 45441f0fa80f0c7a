"""Schedules as pure functions of the optimizer step, which counts from 0: learning rate, decay, masks, sparsity."""

from __future__ import annotations

import math
from typing import Literal

from compressllm.core.errors import RecipeError


def learning_rate(
    step: int,
    total: int,
    peak: float,
    *,
    warmup: float = 0.05,
    shape: Literal["cosine", "linear"] = "cosine",
    floor: float = 0.1,
    cooldown: float = 0.05,
) -> float:
    """The learning rate of a step: up to the peak, down to the floor, and on to 0, which step ``total`` would have.

    The first step already moves; the last step of the warm-up has the peak. What decays towards zero with the rate,
    pruned weights say, gets there only because the rate does.

    Args:
        warmup: Share of the steps in which the rate rises, in a line.
        shape: How it falls from the peak to the floor.
        floor: Share of the peak.
        cooldown: Share of the steps, the last ones, in which it falls from the floor to 0, in a line.
    """
    rise, fall = round(warmup * total), total - round(cooldown * total)
    if step < rise:
        return peak * (step + 1) / rise
    if step >= fall:
        return peak * floor * max(0, total - step) / (total - fall) if total > fall else 0.0
    done = (step - rise) / max(1, fall - rise)
    left = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (floor + (1 - floor) * left)


def annealed_decay(step: int, ramp: int, strength: float) -> float:
    """Decay of pruned weights: 0 at step 0, in a line to its full strength at step ``ramp``, and then constant.

    Weak at first, so that weights still cross from one side of the mask to the other; strong later, so that the masks
    come to rest. Source: AST, arXiv 2407.20584, section 4.2.
    """
    return strength * min(1.0, step / ramp) if ramp > 0 else strength


def gradual_sparsity(step: int, start: int, interval: int, prunings: int, initial: float, final: float) -> float:
    """Fraction removed at a step: from ``initial`` to ``final``, fast at first, in steps of ``interval``.

    The masks change at ``start + k * interval`` for k in 0..prunings, and stay as they are from then on.

    Source: Zhu and Gupta, arXiv 1710.01878, equation 1.
    """
    done = min(prunings, max(0, step - start) // interval) if prunings > 0 else 1
    left = 1 - done / max(1, prunings) if prunings > 0 else 0.0
    return final + (initial - final) * left**3


def iterative_sparsity(cycle: int, cycles: int, final: float) -> float:
    """Fraction removed after ``cycle`` of ``cycles`` prunings, each of which removes the same share of what is left."""
    return final if cycle >= cycles else 1 - (1 - final) ** (cycle / cycles)


def mask_decay(
    step: int,
    total: int,
    rate: float = 2e-4,
    *,
    shape: Literal["linear", "exponential"] = "exponential",
    hard: float = 0.0,
) -> float:
    """What pruned weights are multiplied by in the forward pass: 1 at step 0, falling to 0.

    Args:
        rate: How fast, a step.
        hard: Share of the steps, the last ones, in which the factor is exactly 0.

    Source: mask decay based gradual flow (MdGF), arXiv 2402.04744, section 4.1.
    """
    if step >= total - round(hard * total):
        return 0.0
    return max(0.0, 1 - rate * step) if shape == "linear" else math.exp(-rate * step)


def structure_decay(
    step: int, total: int, n: int, m: int, *, kind: Literal["stepwise", "geometric", "densify"] = "stepwise"
) -> tuple[int, int]:
    """The N:M pattern at a step, on its way to ``n:m`` over frames of equal length; the last frame has the target.

    - stepwise: (m-1):m, then m/2:m, m/4:m, ...: 3:4, 2:4.
    - geometric: groups shrink at the same density: 16:32, 8:16, 4:8, 2:4.
    - densify: groups shrink around the same n: 2:32, 2:16, 2:8, 2:4.

    Source: structure decay based gradual flow (SdGF), arXiv 2402.04744, section 4.2.

    Raises: RecipeError for a stepwise way to a pattern that halving does not reach.
    """
    frames = _frames(n, m, kind)
    return frames[min(len(frames) - 1, step * len(frames) // max(1, total))]


def _frames(n: int, m: int, kind: Literal["stepwise", "geometric", "densify"]) -> list[tuple[int, int]]:
    if kind == "geometric":
        return [(n << i, m << i) for i in (3, 2, 1, 0)]
    if kind == "densify":
        return [(n, m << i) for i in (3, 2, 1, 0)]
    halvings = (m // n).bit_length() - 1
    if n << halvings != m:
        raise RecipeError(f"structure decay: {n}:{m} is not reached by halving {m}; take one like 2:4, or geometric")
    kept = [m - 1, *(m >> i for i in range(1, halvings + 1))]
    return [(one, m) for one in dict.fromkeys(kept)]
