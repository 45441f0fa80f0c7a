import pytest
import torch

from compressllm.kernels.native.library import unavailable


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if reason := unavailable():
        pytest.skip(reason)


@pytest.fixture
def awkward():
    """Makes a (rows, columns) bf16 weight and its mask: groups keep two, one or none; some kept are 0.0 or -0.0."""

    def make(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(rows)
        order = torch.rand(rows, columns // 4, 4, generator=random).argsort(-1)
        kept = torch.randint(0, 5, (rows, columns // 4, 1), generator=random).clamp(max=2)
        keep = (order < kept).view(rows, columns)
        weight = (torch.randn(rows, columns, generator=random) / columns**0.5).bfloat16()
        weight[torch.rand(rows, columns, generator=random) < 0.05] = -0.0
        weight[torch.rand(rows, columns, generator=random) < 0.05] = 0.0
        return weight.masked_fill(~keep, 0.0), keep

    return make
