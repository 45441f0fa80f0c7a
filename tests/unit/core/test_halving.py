import pytest
import torch
from torch import Tensor

from compressllm.core.halving import Halving

ROWS = torch.arange(11)


def scarce(most: int, tried: list[int]):
    """Work that takes so many rows at once."""

    def work(batch: Tensor) -> list[int]:
        tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError
        return batch.tolist()

    return work


@pytest.mark.parametrize("most", [1, 2, 3, 5, 10, 11])
def test_every_row_is_done_once_and_in_order(most: int) -> None:
    tried: list[int] = []
    parts = Halving().run(scarce(most, tried), ROWS)
    assert [row for part in parts for row in part] == ROWS.tolist()
    assert max(map(len, parts)) <= most


def test_what_was_found_holds_for_later_batches() -> None:
    said: list[str] = []
    halving, tried = Halving(said.append), []
    halving.run(scarce(3, tried), ROWS)
    halving.run(scarce(3, tried), ROWS)
    assert tried == [11, 5, 2, 2, 2, 2, 2, 1, *[2] * 5, 1]
    assert said == [f"out of memory with {n} windows at once; going on with {n // 2}" for n in (11, 5)]


def test_only_sizes_that_can_be_taken_are_asked_for() -> None:
    tried: list[int] = []
    Halving().run(scarce(4, tried), ROWS, sizes={11, 8, 4, 2, 1})
    assert tried == [11, 4, 4, 2, 1]


def test_one_row_too_many_is_an_error_and_other_errors_pass() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Halving().run(scarce(0, []), ROWS)
    with pytest.raises(ZeroDivisionError):
        Halving().run(lambda batch: 1 // 0, ROWS)
