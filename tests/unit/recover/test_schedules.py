"""Schedules at their boundaries."""

import math

import pytest

from compressllm.core.errors import RecipeError
from compressllm.recover.schedules import (
    annealed_decay,
    gradual_sparsity,
    iterative_sparsity,
    learning_rate,
    mask_decay,
    structure_decay,
)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_learning_rate_rises_falls_to_its_floor_and_ends_at_zero(shape: str) -> None:
    rate = lambda step: learning_rate(step, 100, 2.0, warmup=0.1, shape=shape, floor=0.1, cooldown=0.2)  # noqa: E731
    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == rate(10) == 2.0
    assert rate(45) == pytest.approx(1.1)  # half-way between the peak and the floor
    assert rate(80) == pytest.approx(0.2)
    assert rate(90) == pytest.approx(0.1)
    assert rate(99) == pytest.approx(0.01)
    assert rate(100) == 0.0
    rates = [rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_is_above_the_line_first_and_below_it_later() -> None:
    rates = {shape: [learning_rate(at, 100, 1.0, shape=shape) for at in (20, 80)] for shape in ("cosine", "linear")}
    assert rates["cosine"][0] > rates["linear"][0]
    assert rates["cosine"][1] < rates["linear"][1]


def test_learning_rate_without_warmup_and_cooldown() -> None:
    assert learning_rate(0, 10, 1.0, warmup=0, floor=0, cooldown=0) == 1.0
    assert learning_rate(10, 10, 1.0, warmup=0, floor=0.5, cooldown=0) == 0.0
    assert all(learning_rate(step, 1, 1.0) > 0 for step in (0,))


def test_annealed_decay() -> None:
    assert [annealed_decay(step, 10, 4.0) for step in (0, 5, 10, 11)] == [0.0, 2.0, 4.0, 4.0]
    assert annealed_decay(0, 0, 4.0) == 4.0


def test_gradual_sparsity_is_cubic_in_the_prunings_done() -> None:
    at = lambda step: gradual_sparsity(step, start=10, interval=5, prunings=4, initial=0.2, final=0.5)  # noqa: E731
    assert [at(step) for step in (0, 10, 14)] == pytest.approx([0.2] * 3)
    assert at(15) == at(19) == pytest.approx(0.5 - 0.3 * 0.75**3)
    assert at(29) == pytest.approx(0.5 - 0.3 * 0.25**3)
    assert at(30) == at(1000) == 0.5
    assert gradual_sparsity(0, 0, 1, 0, 0.2, 0.5) == 0.5


def test_iterative_sparsity_takes_the_same_share_each_time() -> None:
    kept = [1 - iterative_sparsity(cycle, 3, 0.7) for cycle in range(5)]
    assert kept[0] == 1.0
    assert kept[3] == kept[4] == pytest.approx(0.3)
    assert kept[1] / kept[0] == pytest.approx(kept[2] / kept[1]) == pytest.approx(kept[3] / kept[2])


def test_mask_decay() -> None:
    assert mask_decay(0, 100) == mask_decay(0, 100, shape="linear") == 1.0
    assert mask_decay(50, 100, 0.01) == pytest.approx(math.exp(-0.5))
    assert [mask_decay(at, 100, 0.02, shape="linear") for at in (25, 50, 80)] == [0.5, 0.0, 0.0]
    assert mask_decay(89, 100, 1e-9, hard=0.1) > 0.99
    assert mask_decay(90, 100, 1e-9, hard=0.1) == 0.0


@pytest.mark.parametrize(
    ("kind", "n", "m", "frames"),
    [
        ("stepwise", 1, 8, [(7, 8), (4, 8), (2, 8), (1, 8)]),
        ("stepwise", 2, 4, [(3, 4), (2, 4)]),
        ("stepwise", 1, 2, [(1, 2)]),
        ("geometric", 2, 4, [(16, 32), (8, 16), (4, 8), (2, 4)]),
        ("densify", 2, 4, [(2, 32), (2, 16), (2, 8), (2, 4)]),
    ],
)
def test_structure_decay_has_frames_of_equal_length(kind: str, n: int, m: int, frames: list[tuple[int, int]]) -> None:
    total = 20 * len(frames)
    seen = [structure_decay(step, total, n, m, kind=kind) for step in range(total)]
    assert seen == [frame for frame in frames for _ in range(20)]
    assert structure_decay(total, total, n, m, kind=kind) == (n, m)


def test_stepwise_needs_a_power_of_two() -> None:
    with pytest.raises(RecipeError, match="2:6 is not reached by halving 6"):
        structure_decay(0, 10, 2, 6)
