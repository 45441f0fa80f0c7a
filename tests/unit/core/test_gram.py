import pytest
import torch

from compressllm.core.gram import add_gram_, mirror_


@pytest.mark.parametrize("columns", [1, 7, 256, 257, 600])
def test_the_sum_of_batches_is_the_gram_matrix_of_all(columns: int) -> None:
    x = torch.randn(90, columns, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(columns, columns)
    for batch in x.split((40, 0, 50)):
        add_gram_(total, batch)
    gram = mirror_(total)
    torch.testing.assert_close(gram.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)


def test_blocks_above_the_diagonal_are_left_out() -> None:
    total = torch.zeros(600, 600)
    add_gram_(total, torch.ones(3, 600))
    assert not total[:256, 256:].any()
    assert int(total.count_nonzero()) == 256 * 256 + 256 * 512 + 88 * 600


def test_the_number_of_threads_changes_no_bit() -> None:
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            total = torch.zeros(300, 300)
            add_gram_(total, x)
            made.append(total)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)
