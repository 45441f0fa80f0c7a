import random

import pytest
from soak import growth, verdict


def wander(per_sample: float) -> tuple[list[float], list[float]]:
    """An hour of memory that goes up and down, now and then by a lot, and grows by so much."""
    chance = random.Random(0)
    seconds = [30.0 * at for at in range(1, 121)]
    jumps = [5e7 if at % 17 == 0 else 0.0 for at in range(120)]
    return seconds, [4e8 + 1e6 * chance.random() + jump + per_sample * at for at, jump in enumerate(jumps)]


def test_noise_is_flat_and_a_slow_leak_is_not() -> None:
    assert verdict(*wander(0.0))["flat"]
    leaks = verdict(*wander(1e5))  # 12 MB an hour
    assert not leaks["flat"]
    assert leaks["growth_bytes"] == pytest.approx(1e5 * 108, rel=0.1)


def test_growth_is_the_slope_over_the_time() -> None:
    assert growth([0.0, 10.0, 20.0, 30.0], [5.0, 6.0, 7.0, 8.0]) == pytest.approx(3.0)


def test_what_fills_in_the_first_tenth_does_not_count() -> None:
    seconds, sizes = wander(0.0)
    assert verdict(seconds, [size / 2 if at < 300 else size for at, size in zip(seconds, sizes, strict=True)])["flat"]


def test_too_few_samples_prove_nothing() -> None:
    with pytest.raises(SystemExit, match="only 3 samples"):
        verdict([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
