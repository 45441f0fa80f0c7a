"""Products with chosen neurons against the same neurons picked out of a dense product."""

import pytest
import torch

from compressllm.kernels import active
from compressllm.kernels.active import active_columns, active_rows
from compressllm.kernels.native.library import library, unavailable

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["scalar", "avx2", "avx512", "neon", "torch"])
def through(request, monkeypatch):
    """Each instruction set's kernels, and torch, which stands in where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(active, "_kernel", lambda name: None)
        return
    if reason := unavailable():
        pytest.skip(reason)
    if request.param not in library().isas:
        pytest.skip(library().refused[request.param])
    monkeypatch.setattr(active, "_kernel", lambda name: getattr(library().c, f"{name}_{request.param}"))


def chosen(neurons, count):
    return torch.randperm(neurons)[:count].int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("neurons", "width", "count"), [(64, 128, 20), (37, 75, 30), (200, 1300, 131), (16, 8, 0)])
def test_computes_the_chosen_neurons(through, neurons, width, count, dtype):
    torch.manual_seed(0)
    weight, index = (torch.randn(neurons, width) / width**0.5).to(dtype), chosen(neurons, count)
    for tokens in (1, 2, 8, 9):
        x = torch.randn(tokens, width).to(dtype)
        exact = x.double() @ weight.double().T[:, index]
        error = (x @ weight.T[:, index] - exact).abs().max() if count else 0
        y = active_rows(x, weight, index)
        assert y.dtype == dtype
        assert y.shape == (tokens, count)
        assert not count or (y - exact).abs().max() <= 2 * error

        x = torch.randn(tokens, count).to(dtype)
        exact = x.double() @ weight.double()[index]
        error = (x @ weight[index] - exact).abs().max()
        y = active_columns(x, weight, index)
        assert y.dtype == dtype
        assert y.shape == (tokens, width)
        assert (y - exact).abs().max() <= 2 * error


def test_an_mlp_of_some_neurons_is_that_of_all_with_the_others_at_zero(through):
    torch.manual_seed(0)
    gate, up, down = torch.randn(96, 64) / 8, torch.randn(96, 64) / 8, torch.randn(64, 96) / 8
    index, x = chosen(96, 40), torch.randn(2, 1, 64)
    mask = torch.zeros(96).index_fill(0, index.long(), 1.0)
    right = ((x @ gate.T).relu() * (x @ up.T) * mask) @ down.T
    some = active_rows(x, gate, index).relu() * active_rows(x, up, index)
    torch.testing.assert_close(active_columns(some, down.T.contiguous(), index), right)


def test_what_does_not_fit():
    x, weight = torch.randn(1, 8), torch.randn(16, 8)
    for index in (torch.tensor([3, 16]), torch.tensor([-1, 3])):
        with pytest.raises((IndexError, RuntimeError)):
            active_rows(x, weight, index.int())
        with pytest.raises((IndexError, RuntimeError)):
            active_columns(torch.randn(1, 2), weight, index.int())
    for wrong in (torch.randn(1, 7), torch.randn(1, 8).bfloat16()):
        with pytest.raises(RuntimeError):
            active_rows(wrong, weight, torch.tensor([3]).int())
    with pytest.raises(RuntimeError):
        active_columns(torch.randn(1, 3), weight, torch.tensor([3]).int())


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    weight, index, before = torch.randn(500, 1200), chosen(500, 300), torch.get_num_threads()
    rows, columns = torch.randn(3, 1200), torch.randn(3, 300)
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((active_rows(rows, weight, index), active_columns(columns, weight, index)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


def test_compiles_into_one_graph():
    weight, index, x = torch.randn(40, 24), chosen(40, 7), torch.randn(2, 24)

    def mlp(x):
        return active_columns(active_rows(x, weight, index).relu(), weight, index)

    assert torch.equal(torch.compile(mlp, fullgraph=True, backend="eager")(x), mlp(x))
    torch.library.opcheck(torch.ops.compressllm.active_rows.default, (x, weight, index), test_utils="test_faketensor")
