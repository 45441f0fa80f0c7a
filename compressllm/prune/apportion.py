"""Whole numbers of removed weights, so that a plan's total is the sparsity asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations_with_replacement
from typing import Final

from compressllm.core.pattern import SparsityPattern, Unstructured

Shape = tuple[int, int]

# A plan this near is left as it is, so that its patterns read as they were asked for.
_NEAR: Final = 1e-5
# What a whole number of weights may be off by once it was a fraction.
_WHOLE: Final = 1e-6
# Linears that are rounded the other way in the end. The steps are the linears' numbers of rows, a handful at most.
_FLIPS: Final = 4


def apportion(plan: Mapping[str, SparsityPattern], shapes: Mapping[str, Shape]) -> dict[str, SparsityPattern]:
    """The plan with each unstructured fraction at a whole number of weights a row, or a matrix for group ``layer``.

    A fraction of a row is seldom whole: 0.6 of 576 is 345.6. Wanda's and SparseGPT's codes round down, which removes
    0.1 % too little at that width. Here some linears round down and others up, alternating front to back, so that
    the total comes as near to what was asked as whole weights of each row let it.

    Args:
        plan: Linear name -> pattern, groups filled in.
        shapes: Linear name -> (out, in).
    """
    free = {name: pattern for name, pattern in plan.items() if isinstance(pattern, Unstructured)}
    total = sum(math.prod(shapes[name]) for name in free)
    units = {name: _unit(pattern, shapes[name]) for name, pattern in free.items()}  # (groups, weights in a group)
    down = {name: pattern.removed_of(units[name][1]) for name, pattern in free.items()}
    part = {name: max(0.0, units[name][1] * free[name].fraction - down[name]) for name in free}
    if math.fsum(part[name] * units[name][0] for name in free) <= _NEAR * total:
        return dict(plan)

    up: dict[str, bool] = {}
    owed = 0.0  # weights by which what is planned so far falls short of what was asked
    for name, share in part.items():
        groups = units[name][0]
        owed += share * groups
        up[name] = share > _WHOLE and 2 * owed >= groups
        owed -= groups * up[name]
    steps = {name: units[name][0] * (-1 if up[name] else 1) for name in free if part[name] > _WHOLE}
    for name in _flips(steps, owed):
        up[name] = not up[name]
    whole = {
        name: Unstructured(fraction_of(down[name] + up[name], units[name][1]), pattern.group)
        for name, pattern in free.items()
        if part[name] > _WHOLE
    }
    return {**plan, **whole}


def _flips(steps: Mapping[str, int], owed: float) -> list[str]:
    """The few linears to round the other way so that what is owed comes nearest to nothing.

    Args:
        steps: Linear name -> weights that more are removed if it is rounded the other way; few distinct numbers.
    """
    of_step: dict[int, list[str]] = {}
    for name, step in steps.items():
        of_step.setdefault(step, []).append(name)
    best: tuple[int, ...] = ()
    for count in range(1, _FLIPS + 1):
        for chosen in combinations_with_replacement(sorted(of_step), count):
            enough = all(chosen.count(step) <= len(of_step[step]) for step in chosen)
            if enough and abs(owed - sum(chosen)) < abs(owed - sum(best)) - _WHOLE:
                best = chosen
    return [of_step[step].pop() for step in best]


def planned_sparsity(plan: Mapping[str, SparsityPattern], shapes: Mapping[str, Shape]) -> float:
    """Fraction of all planned weights that pruners will remove, by count."""
    removed = 0.0
    for name, pattern in plan.items():
        if isinstance(pattern, Unstructured):
            groups, size = _unit(pattern, shapes[name])
            removed += groups * pattern.removed_of(size)
        else:
            removed += pattern.sparsity * math.prod(shapes[name])
    return removed / sum(math.prod(shapes[name]) for name in plan)


def asked_sparsity(plan: Mapping[str, SparsityPattern], shapes: Mapping[str, Shape]) -> float:
    """Fraction of all planned weights that the plan's patterns name."""
    weights = {name: math.prod(shapes[name]) for name in plan}
    return math.fsum(plan[name].sparsity * count for name, count in weights.items()) / sum(weights.values())


def fraction_of(count: int, size: int) -> float:
    """The fraction of which ``Unstructured.removed_of(size)`` is ``count``, to the last bit."""
    fraction = count / size
    while Unstructured(fraction).removed_of(size) < count:  # past 4 million a quotient may fall short
        fraction = math.nextafter(fraction, 1.0)
    return fraction


def _unit(pattern: Unstructured, shape: Shape) -> Shape:
    """How many groups compete within a linear, and how many weights are in each."""
    return (1, math.prod(shape)) if pattern.group == "layer" else shape
