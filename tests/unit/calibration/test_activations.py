from pathlib import Path

import pytest
import torch

from compressllm.calibration.activations import Activations

SHAPES = [(3, 4, 5), (3, 4, 5), (1, 4, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spilled", [False, True])
def test_what_goes_in_comes_out(tmp_path: Path, dtype: torch.dtype, spilled: bool) -> None:
    size = sum(3 * 4 * 5 if shape[0] == 3 else 4 * 5 for shape in SHAPES) * dtype.itemsize
    held = Activations(SHAPES, dtype, limit=size - 1 if spilled else size, folder=tmp_path)
    assert (held.spilled, held.bytes, len(held)) == (spilled, size, 3)
    for turn in range(2):  # outputs take the place of inputs
        values = [torch.randn(shape).to(dtype) + turn for shape in SHAPES]
        for index in (2, 0, 1):
            held[index] = values[index]
        assert all(torch.equal(held[index], value) for index, value in enumerate(values))
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_a_batch_that_was_never_filled_is_not_read() -> None:
    with pytest.raises(IndexError, match="batch 1 has not been filled"):
        Activations(SHAPES, torch.float32, limit=10**6)[1]
