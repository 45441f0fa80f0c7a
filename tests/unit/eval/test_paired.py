"""The paired bootstrap."""

import math

import numpy as np
import pytest

from compressllm.eval.paired import paired_rise, student_quantile

stats = pytest.importorskip("scipy.stats")


def texts(seed: int, count: int = 60) -> np.ndarray:
    """Losses of windows, some of them far harder than others."""
    return 3.0 + 0.5 * np.random.default_rng(seed).standard_normal(count)


def slow(before, after, confidence):
    """One resample, one run of four windows and one window at a time; the quantile for 15 runs from scipy."""
    draw = np.random.default_rng(1)
    ratios = []
    for _ in range(2000):
        starts = [int(draw.integers(len(before))) for _ in range(15)]
        chosen = [(start + at) % len(before) for start in starts for at in range(4)]
        ratios.append(
            math.exp(sum(after[i] for i in chosen) / len(chosen))
            / math.exp(sum(before[i] for i in chosen) / len(chosen))
            - 1
        )
    ratios.sort()
    beyond = stats.norm.cdf(math.sqrt(15 / 14) * stats.t.ppf(1 - confidence, 14))
    return ratios[round(beyond * 2000)], ratios[round((1 - beyond) * 2000) - 1]


def test_is_a_bootstrap_of_the_ratio_of_perplexities():
    before = texts(0)
    after = before + 0.03 + 0.05 * np.random.default_rng(5).standard_normal(60)
    rise = paired_rise(before, after, 0.9)
    assert rise.value == pytest.approx(math.exp(after.mean()) / math.exp(before.mean()) - 1, rel=1e-12)
    low, high = slow(before, after, 0.9)
    assert (rise.low, rise.high) == pytest.approx((low, high), abs=0.001)
    assert rise == paired_rise(before, after, 0.9)


def test_what_makes_a_window_hard_falls_out():
    """Windows differ by 50 %, so a test of means unpaired could never see 2 %."""
    before = texts(0)
    rise = paired_rise(before, before + math.log(1.02))
    assert (rise.value, rise.low, rise.high) == pytest.approx((0.02, 0.02, 0.02))


def test_noise_is_told_from_a_regression():
    """Ten noisy models that are as good, and ten that are 2 % worse, where 1 % is allowed."""
    before = texts(0, 200)
    noise = [0.04 * np.random.default_rng(seed).standard_normal(200) for seed in range(10)]
    assert all(paired_rise(before, before + one).low <= 0.01 for one in noise)
    assert all(paired_rise(before, before + one + math.log(1.02)).low > 0.01 for one in noise)


def share_that_fails(windows: int, rise: float, allowed: float, likeness: float = 0.0, spread: float = 0.02) -> float:
    """Of 300 models that rose by ``rise``; ``likeness`` is the correlation of neighbouring windows' differences."""
    failed = 0
    for seed in range(300):
        noise = np.random.default_rng(seed).standard_normal(windows)
        for at in range(1, windows):
            noise[at] = likeness * noise[at - 1] + math.sqrt(1 - likeness**2) * noise[at]
        failed += paired_rise(np.zeros(windows), math.log1p(rise) + spread * noise).low > allowed
    return failed / 300


#: Three standard deviations of a share of one in twenty.
CHANCE = 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize("windows", [10, 40])
def test_one_in_twenty_fails_at_the_limit(windows):
    """As the confidence says, with few windows too; by the bare value, every other would."""
    assert share_that_fails(windows, 0.01, 0.01) == pytest.approx(0.05, abs=CHANCE)


def test_neighbouring_windows_may_be_alike():
    """Their differences correlate by 0.2 on real text; resampling single windows fails one in ten of 60."""
    assert share_that_fails(60, 0.01, 0.01, likeness=0.2) < 0.05 + CHANCE


def test_power():
    """Windows that scatter by 2 %: 40 find 2 % where 1 % is allowed, 100 find 1 % where 0.2 % is; noise passes."""
    assert share_that_fails(40, 0.02, 0.01, likeness=0.2) > 0.75
    assert share_that_fails(100, 0.01, 0.002) > 0.9
    assert share_that_fails(40, 0.0, 0.01) == 0


def test_students_quantile():
    for freedom in (3, 4, 9, 30, 200):
        for share in (0.01, 0.05, 0.1):
            assert student_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=0.01)


def test_ruined_and_single_windows():
    assert paired_rise([3.0], [3.1]) == pytest.approx([math.expm1(0.1)] * 3)
    assert paired_rise([3.0, 3.0], [900.0, 900.0]).low == math.inf
