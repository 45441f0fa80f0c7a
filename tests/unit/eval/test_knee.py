import math

import pytest

from compressllm.eval.knee import farthest_from_chord, last_within

GRID = [tenth / 10 for tenth in range(10)]


def test_the_last_point_within_the_rise() -> None:
    losses = [2.0, 2.001, 2.01, 2.0199, 2.021, 2.2, 3.0]
    assert last_within(GRID[:7], losses, 2.0, 0.01) == 3
    assert last_within(GRID[:7], losses, 2.0, 0.0) == 0
    assert last_within(GRID[:7], losses, 2.0, 0.5) == 6
    assert last_within(GRID[:4], [2.0, 2.5, 1.9, math.inf], 2.0, 0.01) == 2  # the sparsest, whatever lies before it
    assert last_within([0.0, 0.6, 0.3], [2.0, 2.0, 2.0], 2.0, 0.01) == 1  # in any order


@pytest.mark.parametrize("corner", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_hockey_stick_bends_at_its_corner(corner: float, scale: float) -> None:
    losses = [scale * (2 + max(0.0, s - corner)) for s in GRID]
    assert GRID[farthest_from_chord(GRID, losses)] == corner


def test_an_exponential_bends_where_its_slope_is_the_chords() -> None:
    fine = [step / 1000 for step in range(1001)]
    losses = [math.exp(5 * s) for s in fine]
    expected = math.log((math.exp(5) - 1) / 5) / 5
    assert fine[farthest_from_chord(fine, losses)] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("losses", [[2.0, 2.5, 3.0], [2.0, 2.9, 3.0], [2.0, 2.0, 2.0], [2.0, 3.0], [2.0]])
def test_what_does_not_bend_upwards_has_no_bend(losses: list[float]) -> None:
    assert farthest_from_chord(GRID[: len(losses)], losses) is None
