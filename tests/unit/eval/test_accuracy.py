"""Bounds on a difference in accuracy."""

import math

import numpy as np
import pytest

from compressllm.eval.accuracy import paired_drop, unpaired_drop


def models(draw: np.random.Generator, items: int, before: float, drop: float, changed: float):
    """Two models' scores on the same items: of a share ``changed`` one is right and the other wrong."""
    lost, gained = (changed + drop) / 2, (changed - drop) / 2
    kind = draw.random(items)
    right = kind < before - lost  # both
    first = right | ((kind >= before - lost) & (kind < before))
    second = right | (kind >= 1 - gained)
    return first.astype(int).tolist(), second.astype(int).tolist()


def test_is_the_mean_of_differences_with_their_standard_error():
    """Against the sums written out, on so many items that half an item more does not matter."""
    draw = np.random.default_rng(0)
    pairs = [models(draw, 40_000, 0.6, 0.05, 0.2), models(draw, 20_000, 0.5, 0.0, 0.1)]
    before, after = [one for one, _ in pairs], [other for _, other in pairs]
    differences = [np.array(one) - np.array(other) for one, other in pairs]
    value = sum(one.mean() for one in differences) / 2
    error = math.sqrt(sum(one.var() / len(one) for one in differences)) / 2
    found = paired_drop(before, after, 0.975)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=2e-5)


def test_nothing_changed_is_not_certain():
    found = paired_drop([[1, 0] * 50], [[1, 0] * 50])
    assert found.value == 0
    assert -0.03 < found.low < 0 < found.high < 0.03
    three_lost = paired_drop([[1] * 100], [[0] * 3 + [1] * 97])
    assert three_lost.low < 0  # of four changed items three one way is a common toss


@pytest.mark.parametrize(("items", "changed"), [(70, 0.1), (300, 0.06), (1000, 0.2)])
def test_few_that_fell_as_far_as_is_allowed_are_beyond_it(items, changed):
    """One in twenty, within three standard deviations of so many tries; counts are whole, so it may be fewer."""
    draw = np.random.default_rng(1)
    tries, allowed = 400, 0.02
    fails = 0
    for _ in range(tries):
        before, after = models(draw, items, 0.6, allowed, changed)
        fails += paired_drop([before], [after]).low > allowed
    assert fails <= 0.05 * tries + 3 * math.sqrt(0.05 * 0.95 * tries)


def test_noise_passes_and_a_real_drop_fails_over_several_tasks():
    """Ten tasks of 300 items, half a point allowed: without a drop none of 100 fails, with 3 points nearly all do."""
    draw = np.random.default_rng(2)

    def low(drop: float) -> float:
        pairs = [models(draw, 300, 0.5, drop, 0.15) for _ in range(10)]
        return paired_drop([one for one, _ in pairs], [other for _, other in pairs]).low

    assert sum(low(0.0) > 0.005 for _ in range(100)) <= 4
    assert sum(low(0.03) > 0.005 for _ in range(100)) >= 90


def test_unpaired_is_wider():
    before, after = models(np.random.default_rng(3), 500, 0.6, 0.02, 0.1)
    numbers = [(np.mean(one), np.std(one) / math.sqrt(500)) for one in (before, after)]
    paired, unpaired = paired_drop([before], [after]), unpaired_drop(*numbers)
    assert unpaired.value == pytest.approx(paired.value)
    assert unpaired.high - unpaired.low > 2 * (paired.high - paired.low)
    assert unpaired_drop((0.5, None), (0.4, None)) == pytest.approx((0.1, 0.1, 0.1))
