import threading
import time
from collections.abc import Iterator

import pytest
import torch

from compressllm.core.parallel import for_chunks, map_batches

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batches", [0, 1, 2, 9])
def test_results_come_in_order_whichever_is_ready_first(two_threads: None, batches: int) -> None:
    def slow_when_even(batch: int) -> int:
        time.sleep(0.01 * (batch % 2 == 0))
        return batch

    assert list(map_batches(slow_when_even, batches, CPU)) == list(range(batches))


def test_the_first_batch_is_taken_before_any_other_begins(two_threads: None) -> None:
    begun: list[int] = []
    results = map_batches(begun.append, 5, CPU)
    next(results)
    time.sleep(0.05)
    assert begun == [0]
    list(results)
    assert sorted(begun) == [0, 1, 2, 3, 4]


def test_as_many_run_at_once_as_torch_has_threads(two_threads: None) -> None:
    together = threading.Barrier(2, timeout=10)

    def work(batch: int) -> int:
        if batch:
            together.wait()  # passes only if another batch runs too
        return torch.get_num_threads()

    assert list(map_batches(work, 5, CPU)) == [1] * 5  # each on one thread
    assert torch.get_num_threads() == 2


def test_only_a_few_results_wait(two_threads: None) -> None:
    begun: list[int] = []
    results = map_batches(begun.append, 100, CPU)
    for _ in range(3):
        next(results)
    time.sleep(0.05)
    assert len(begun) <= 3 + 2 + 1


def test_an_error_comes_where_its_result_would_and_ends_the_work(two_threads: None) -> None:
    begun: list[int] = []

    def work(batch: int) -> int:
        begun.append(batch)
        if batch == 3:
            raise ValueError("batch 3")
        return batch

    results, got = map_batches(work, 100, CPU), []
    with pytest.raises(ValueError, match="batch 3"):
        got.extend(results)
    assert got == [0, 1, 2]
    assert len(begun) < 10


def test_elsewhere_than_on_a_cpu_batches_go_one_by_one_in_this_thread(two_threads: None) -> None:
    threads = set(map_batches(lambda batch: threading.get_ident(), 4, torch.device("meta")))
    assert threads == {threading.get_ident()}


def test_in_rounds_nothing_runs_while_a_result_is_with_the_caller(two_threads: None) -> None:
    running, seen = threading.Semaphore(2), []

    def work(batch: int) -> int:
        with running:
            time.sleep(0.01)
        return batch

    for result in map_batches(work, 6, CPU, rounds=True):
        assert running._value == 2
        seen.append(result)
    assert seen == list(range(6))


@pytest.mark.parametrize(
    ("start", "stop", "size", "expected"),
    [
        (0, 0, 3, []),
        (2, 2, 3, []),
        (0, 3, 3, [slice(0, 3)]),
        (0, 2, 3, [slice(0, 2)]),
        (1, 8, 3, [slice(1, 4), slice(4, 7), slice(7, 8)]),
    ],
    ids=str,
)
def test_chunks_cover_the_range(two_threads: None, start: int, stop: int, size: int, expected: list[slice]) -> None:
    seen: list[slice] = []
    for_chunks(seen.append, start, stop, size, CPU)
    assert sorted(seen, key=lambda chunk: chunk.start) == expected


@pytest.mark.parametrize("inference", [False, True])
def test_chunks_run_in_the_callers_inference_mode(two_threads: None, inference: bool) -> None:
    with torch.inference_mode(inference):
        total = torch.zeros(9)
        for_chunks(lambda chunk: total[chunk].add_(1), 0, 9, 2, CPU)
    assert total.tolist() == [1.0] * 9
    assert total.is_inference() == inference


def test_a_chunk_that_fails_fails_the_call(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        for_chunks(lambda chunk: 1 // (chunk.start - 2), 0, 9, 2, CPU)
