"""The paired bootstrap."""

import math

import numpy as np
import pytest

from compressllm.eval.paired import paired_rise


def texts(seed: int, count: int = 60) -> np.ndarray:
    """Losses of windows, some of them far harder than others."""
    return 3.0 + 0.5 * np.random.default_rng(seed).standard_normal(count)


def slow(before, after, confidence):
    """One resample and one window at a time."""
    draw = np.random.default_rng(1)
    ratios = []
    for _ in range(2000):
        chosen = [int(draw.integers(len(before))) for _ in before]
        ratios.append(
            math.exp(sum(after[i] for i in chosen) / len(chosen))
            / math.exp(sum(before[i] for i in chosen) / len(chosen))
            - 1
        )
    ratios.sort()
    return ratios[round((1 - confidence) * 2000)], ratios[round(confidence * 2000) - 1]


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


def test_at_the_limit_few_fail():
    """One in twenty of those that rose just as far as is allowed; by the bare value, every other would."""
    failed = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        difference = math.log(1.01) + 0.05 * draw.standard_normal(50)
        failed += paired_rise(np.zeros(50), difference).low > 0.01
    assert 2 <= failed <= 24


def test_ruined_and_single_windows():
    assert paired_rise([3.0], [3.1]) == pytest.approx([math.expm1(0.1)] * 3)
    assert paired_rise([3.0, 3.0], [900.0, 900.0]).low == math.inf
