"""Products of a few tokens against torch's in float64."""

import pytest
import torch
from torch.nn import functional

from compressllm.kernels import few
from compressllm.kernels.few import few_tokens
from compressllm.kernels.native.library import library, unavailable


@pytest.fixture(params=["scalar", "avx2", "avx512", "neon"])
def through(request, monkeypatch):
    """Each instruction set's kernel in turn; the list of sizes it was called with."""
    if reason := unavailable():
        pytest.skip(reason)
    if request.param not in library().isas:
        pytest.skip(library().refused[request.param])
    kernel, calls = getattr(library().c, f"few_tokens_{request.param}"), []

    def called(*arguments):
        calls.append(arguments[3:])
        kernel(*arguments)

    monkeypatch.setattr(few, "_kernel", lambda: called)
    monkeypatch.setattr(few, "has_tiles", lambda: False)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (101, 75), (1, 8), (50, 1300), (48, 3)])
def test_computes_what_a_linear_does(through, rows, columns, dtype):
    torch.manual_seed(0)
    weight, bias = (torch.randn(rows, columns) / columns**0.5).to(dtype), torch.randn(rows).to(dtype)
    for tokens in (1, 2, 3, 4, 5, 11, 16, 17):
        x = torch.randn(1, tokens, columns).to(dtype)
        for added in (None, bias):
            exact = functional.linear(x.double(), weight.double(), added.double() if added is not None else None)
            y = few_tokens(x, weight, added)
            assert y.dtype == dtype
            assert y.shape == (1, tokens, rows)
            # What rounding may do at most: of sums at every step, of the result and of the result with the bias.
            sums = functional.linear(x.double().abs(), weight.double().abs())
            allowed = columns * torch.finfo(torch.float32).eps * sums + 2 * torch.finfo(dtype).eps * sums
            if added is not None:
                allowed = allowed + torch.finfo(dtype).eps * bias.double().abs()
            assert ((y - exact).abs() <= allowed).all()
    assert bool(through) == (dtype != torch.float16), "few tokens go through the kernel, and nothing else does"


def test_where_a_gradient_is_wanted_torch_computes_it(through):
    weight = torch.randn(8, 16, requires_grad=True)
    few_tokens(torch.randn(3, 16), weight).sum().backward()
    assert weight.grad is not None
    assert not through


def test_the_number_of_threads_changes_no_bit(through):
    torch.manual_seed(0)
    weight, x, before = torch.randn(500, 1200), torch.randn(6, 1200), torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(few_tokens(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


def test_bfloat16_is_left_to_torch_where_it_has_tiles(through, monkeypatch):
    monkeypatch.setattr(few, "has_tiles", lambda: True)
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    few_tokens(x.bfloat16(), weight.bfloat16())
    assert not through
    few_tokens(x, weight)
    assert through
