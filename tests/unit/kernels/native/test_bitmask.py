"""The unstructured bf16 format: bits and products against the weight it was made of."""

import pytest
import torch
from torch.nn import functional

from compressllm.core.masks import raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import BACKENDS
from compressllm.core.registry import build
from compressllm.kernels.native import bitmask
from compressllm.kernels.native.library import library

SHAPES = [(16, 256), (1, 3), (33, 40), (50, 1000), (300, 2100)]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 33]
ISAS = ["scalar", "avx2", "avx512", "neon"]


@pytest.fixture(params=ISAS)
def kernel(request):
    if request.param not in library().isas:
        pytest.skip(f"{request.param}: {library().refused[request.param]}")
    return library().kernel("bitmask", request.param)


def sparse(rows, columns):
    """Rows from all kept to none; some kept weights are 0.0 or -0.0."""
    torch.manual_seed(rows)
    keep = torch.rand(rows, columns) < torch.linspace(1.0, 0.0, rows).unsqueeze(1)
    weight = (torch.randn(rows, columns) / columns**0.5).bfloat16()
    weight[torch.rand(rows, columns) < 0.1] = -0.0
    return weight.masked_fill(~keep, 0.0), keep


def test_the_layout_is_the_documented_one():
    weight, keep = sparse(21, 300)
    blocks = bitmask.pack(weight, keep)
    offsets, at = blocks[: 8 * 5].view(torch.int64).tolist(), 8 * 5
    for row_block in (0, 16):
        for column_block in (0, 256):
            assert offsets.pop(0) == at
            part, kept = torch.zeros(16, 256, dtype=torch.bfloat16), torch.zeros(16, 256, dtype=torch.bool)
            taken = keep[row_block : row_block + 16, column_block : column_block + 256]
            kept[: taken.shape[0], : taken.shape[1]] = taken
            part[: taken.shape[0], : taken.shape[1]] = weight[
                row_block : row_block + 16, column_block : column_block + 256
            ]
            bits = sum(kept.view(16, 32, 8)[..., i].int() << i for i in range(8)).to(torch.uint8).flatten()
            assert torch.equal(blocks[at : at + 512], bits)
            values = raw(part[kept]).clone().view(torch.uint8)
            assert torch.equal(blocks[at + 512 : at + 512 + len(values)], values)
            at += 512 + len(values)
    assert offsets == [at]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_every_bit_back(shape):
    weight, keep = sparse(*shape)
    assert torch.equal(raw(bitmask.unpack(bitmask.pack(weight, keep), *shape)), raw(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_twice_what_torch_errs(kernel, shape, dtype):
    weight, keep = sparse(*shape)
    x, bias = torch.randn(33, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    allowed = 2 * (functional.linear(x, weight.to(dtype), bias) - exact).abs().max()
    blocks = bitmask.pack(weight, keep)
    for tokens in TOKENS:
        y = library().linear(kernel, x[:tokens], blocks, bias, shape[0])
        assert (y - exact[:tokens]).abs().max() <= allowed


def test_the_number_of_threads_changes_no_bit():
    weight, keep = sparse(640, 1000)
    blocks, x, before = bitmask.pack(weight, keep), torch.randn(9, 1000), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(bitmask.linear(x, blocks, None, 640))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_reaches_at_least_the_rows_that_keep_its_column(kernel, value):
    weight, keep = sparse(33, 40)
    keep[:, 7], weight[:, 7] = torch.arange(33) % 2 == 0, 1.0
    weight = weight.masked_fill(~keep, 0.0)
    x = torch.randn(2, 40)
    x[1, 7] = value
    y = library().linear(kernel, x, bitmask.pack(weight, keep), None, 33)
    assert y[0].isfinite().all()
    assert not y[1, ::2].isfinite().any()


def test_compiles_into_one_graph():
    weight, keep = sparse(33, 40)
    blocks, x = bitmask.pack(weight, keep), torch.randn(2, 40)
    step = torch.compile(lambda x: bitmask.linear(x, blocks, None, 33) * 2, fullgraph=True, backend="eager")
    assert torch.equal(step(x), bitmask.linear(x, blocks, None, 33) * 2)


def test_wants_what_it_is_faster_at():
    backend, weight = build(BACKENDS, "native-bitmask"), torch.zeros(16, 16, dtype=torch.bfloat16)
    assert backend.refuses(weight, Unstructured(0.5)) is None
    assert backend.refuses(weight, NM(4, 8)) is None
    assert "from a sparsity of 0.5 on, not at 0.4" in backend.refuses(weight, Unstructured(0.4))
    assert backend.refuses(weight, Unstructured(0.4), wanted=True) is None
    assert "torch.float32" in backend.refuses(weight.float(), Unstructured(0.5))
