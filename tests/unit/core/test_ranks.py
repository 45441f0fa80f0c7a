import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from compressllm.core.errors import BackendUnavailableError, CalibrationError, RankError, RunError
from compressllm.core.launch import launched_ranks
from compressllm.core.ranks import ALONE

Launch = Callable[..., list[Any]]


def test_ranks_meet(launch: Launch) -> None:
    odd = torch.tensor([[-0.0, float("nan"), 1.0], [float("inf"), 3.0, -2.0]], dtype=torch.bfloat16)

    def work(rank: int) -> Any:
        with launched_ranks() as ranks:
            assert (ranks.rank, ranks.size) == (rank, 3)
            given = ranks.exchange({"rank": rank})
            with torch.inference_mode():
                made_there = torch.full((2,), 2.0**rank)
            sums = [torch.full((3, 2), float(rank)), made_there, torch.empty(0)]
            ranks.sum_(sums)
            weight = odd.clone() if rank == 2 else torch.zeros_like(odd)
            keep = torch.tensor([True, False, True]) if rank == 1 else torch.zeros(3, dtype=torch.bool)
            ranks.copy_from_([(2, weight), (1, keep)])
            return given, sums, weight, keep

    for given, sums, weight, keep in launch(work, 3):
        assert given == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert torch.equal(sums[0], torch.full((3, 2), 3.0))
        assert torch.equal(sums[1], torch.full((2,), 7.0))
        assert torch.equal(weight.view(torch.int16), odd.view(torch.int16))
        assert keep.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CalibrationError("no text"), "rank 1: no text"),
        (OSError(28, "No space left on device", "/full"), "rank 1: /full: No space left on device"),
        (ValueError("a\nbug"), "rank 1: ValueError: a bug"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_rank_that_fails_tells_the_others_instead_of_leaving_them_waiting(
    launch: Launch, error: Exception, told: str
) -> None:
    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            ranks.exchange(None)
            if rank == 1:
                raise error
            ranks.sum_([torch.ones(2)])
            pytest.fail("the sum of a rank that failed was taken")

    first, second, third = launch(work, 3)
    assert isinstance(second, type(error))
    for other in (first, third):
        assert isinstance(other, RankError)
        assert str(other) == told


def test_an_error_after_the_last_meeting_is_known_to_all(launch: Launch) -> None:
    def work(rank: int) -> None:
        with launched_ranks():
            if rank == 1:
                raise CalibrationError("late")

    first, second = launch(work)
    assert isinstance(first, RankError)
    assert str(first) == "rank 1: late"
    assert isinstance(second, CalibrationError)


def test_ranks_that_all_fail_raise_their_own_errors(launch: Launch) -> None:
    def work(rank: int) -> None:
        with launched_ranks():
            raise CalibrationError(f"mine: {rank}")

    assert [str(error) for error in launch(work)] == ["mine: 0", "mine: 1"]


def test_a_rank_that_dies_is_noticed(launch: Launch) -> None:
    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            ranks.exchange(None)
            if rank == 1:
                os._exit(9)
            ranks.exchange(None)

    first, second = launch(work)
    assert second is None
    assert isinstance(first, RunError)
    assert "rank 0: lost contact" in str(first)


def test_ranks_out_of_step_are_stopped(launch: Launch) -> None:
    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            ranks.sum_([torch.ones(2 + rank)])

    for error in launch(work):
        assert isinstance(error, RunError)
        assert "out of step" in str(error)


def test_ranks_agree_or_say_where_they_differ(launch: Launch) -> None:
    def work(rank: int) -> None:
        with launched_ranks() as ranks:
            ranks.agree({"seed": 0, "text": "same"})
            ranks.agree({"seed": rank // 2, "text": "same"})

    first, second, third = launch(work, 3)
    assert {type(error) for error in (first, second, third)} == {RunError}
    assert str(first).startswith("rank 0 and rank 2 differ in seed;")
    assert str(second).startswith("rank 1 and rank 2 differ in seed;")
    assert str(third).startswith("rank 0 and rank 2 differ in seed;")


def test_the_first_goes_first(launch: Launch) -> None:
    def work(rank: int) -> float:
        def make() -> float:
            if rank == 0:
                time.sleep(0.2)
            return time.monotonic()

        with launched_ranks() as ranks:
            return ranks.first_then_rest(make)

    first, second = launch(work)
    assert first < second


def test_a_process_group_that_is_there_already_is_used_and_left(launch: Launch) -> None:
    def work(rank: int) -> tuple[list[int], list[int]]:
        dist.init_process_group("gloo")
        with launched_ranks() as ranks:
            met = ranks.exchange(rank)
        still = [0, 0]
        dist.all_gather_object(still, rank)
        return met, still

    assert launch(work) == [([0, 1], [0, 1])] * 2


def test_no_launcher_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with launched_ranks() as ranks:
        assert ranks is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launched_ranks() as ranks:
        assert ranks is ALONE
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK is 1 where WORLD_SIZE is 1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "could not join"),
    ],
)
def test_a_launcher_that_is_not_sound(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message), launched_ranks():
        pass


def test_shares_are_contiguous_and_cover_all_windows(launch: Launch) -> None:
    windows = torch.arange(14).view(7, 2)

    def work(rank: int) -> Any:
        with launched_ranks() as ranks:
            share = ranks.share(windows)
            try:
                ranks.share(windows[:2])
            except CalibrationError as error:
                return share, str(error)

    results = launch(work, 3)
    assert torch.equal(torch.cat([share for share, _ in results]), windows)
    assert {len(share) for share, _ in results} == {2, 3}
    assert all(error.startswith("2 calibration windows are fewer than the 3 processes") for _, error in results)


def test_each_rank_needs_a_device_of_its_own(launch: Launch) -> None:
    def work(rank: int) -> tuple[str, str]:
        with launched_ranks() as ranks:
            torch.cuda.device_count = lambda: 1
            torch.cuda.set_device = lambda device: None
            own = str(ranks.own_device(torch.device("cpu")))
            try:
                return own, str(ranks.own_device(torch.device("cuda")))
            except BackendUnavailableError as error:
                return own, str(error)

    first, second = launch(work)
    assert first == ("cpu", "cuda:0")
    assert second[0] == "cpu"
    assert "finds 1" in second[1]
