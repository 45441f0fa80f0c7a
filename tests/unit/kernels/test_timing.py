import time

import pytest
import torch

from compressllm.kernels import timing
from compressllm.kernels.timing import interleaved, past_caches, ratio, rotating, spread, working_set

CPU = torch.device("cpu")


def test_every_round_runs_all_of_them_in_alternating_order():
    ran = []
    calls = {name: lambda name=name: (ran.append(name), time.sleep(2e-3)) for name in "abc"}
    times = interleaved(calls, 0.0, CPU, least_rounds=4)
    assert "".join(ran) == "aabbcc" + "cbaabccbaabc"  # a call to warm up, and one to see how long it takes
    assert all(len(of_one) == 4 and min(of_one) >= 2e-3 for of_one in times.values())


def test_short_calls_are_repeated_and_time_is_kept_to():
    count = [0]

    def call():
        count[0] += 1

    begun = time.perf_counter()
    (times,) = interleaved({"short": call}, 0.1, CPU).values()
    assert time.perf_counter() - begun < 5
    assert len(times) >= 3
    assert count[0] > 100 * len(times)
    assert max(times) < 1e-3


def test_rotating_takes_each_in_turn():
    call = rotating(lambda one: one * 2, [1, 2, 3])
    assert [call() for _ in range(5)] == [2, 4, 6, 2, 4]


def test_spread_and_ratio():
    assert spread([4.0, 1.0, 3.0, 2.0]) == {"median": 2.5, "low": 1.25, "high": 3.75, "rounds": 4}
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "rounds": 1}
    assert ratio([1.0, 2.0, 10.0], to=[2.0, 4.0, 10.0]) == pytest.approx(2.0)


def test_the_working_set_is_larger_than_any_cache():
    assert working_set(CPU) >= 128 << 20


def test_copies_are_made_one_by_one_until_they_are_past_the_caches_or_too_many():
    mib = 1 << 20
    copies, size = past_caches(lambda: {"a": torch.empty(32 * mib, dtype=torch.uint8), "b": "no tensor"}, CPU)
    assert size == 32 * mib
    assert (len(copies) - 1) * size < working_set(CPU) <= len(copies) * size
    assert len({one["a"].data_ptr() for one in copies}) == len(copies)
    assert len(past_caches(lambda: [torch.empty(4)], CPU, most=7)[0]) == 7


def test_those_that_take_turns_share_the_working_set(monkeypatch):
    monkeypatch.setattr(timing, "_PAST_CACHES", 1 << 30)  # so that it is more than the least of it on any machine
    whole = working_set(CPU)
    if whole == 128 << 20:
        pytest.skip("this machine does not say how large its caches are")
    assert working_set(CPU, turns=4) == whole // 4
    monkeypatch.setattr(timing, "_PAST_CACHES", 0)
    assert working_set(CPU, turns=4) == 128 << 20, "the least"
