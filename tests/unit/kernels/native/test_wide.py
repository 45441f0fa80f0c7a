"""Formats for many tokens: weights made dense, tile by tile, against float64."""

import pytest
import torch
from torch.nn import functional

from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.kernels.native import bf16, bitmask, integer
from compressllm.kernels.native.library import library

SHAPES = [(64, 128), (1, 36), (33, 40), (50, 1000), (300, 544), (48, 14336)]
TOKENS = [1, 8, 15, 16, 17, 31, 32, 33, 47, 64, 65, 70]


@pytest.fixture(params=["scalar", "amx"])
def isa(request):
    if request.param not in library().isas:
        pytest.skip(f"{request.param}: {library().refused[request.param]}")
    return request.param


def compare(run, weight, isa, tokens=TOKENS):
    """Errors against float64 are within twice those of torch with the dense bfloat16 weight."""
    rows, columns = weight.shape
    ours, torchs = [], []
    for count in tokens[:4] if isa == "scalar" else tokens:
        x = torch.randn(count, columns).bfloat16()
        for bias in (None, torch.randn(rows).bfloat16()):
            exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            got = run(x, bias)
            assert got.shape == (count, rows)
            assert got.dtype == torch.bfloat16
            ours.append((got - exact).flatten())
            torchs.append((functional.linear(x, weight, bias) - exact).flatten())
    ours, torchs = torch.cat(ours), torch.cat(torchs)
    assert ours.norm() <= 2 * torchs.norm()
    assert ours.abs().max() <= 2 * torchs.abs().max()


def same_on_any_threads(run):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_errs_no_more_than_twice_what_torch_errs(awkward, isa, shape):
    weight, keep = awkward(*shape)
    blocks, kernel = bf16.pack(weight, keep), library().kernel("bf16wide", isa)
    compare(lambda x, bias: library().linear(kernel, x, blocks, bias, shape[0]), weight, isa)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_errs_no_more_than_twice_what_torch_errs(awkward, isa, bits, group):
    for rows, columns in ((33, 40), (50, 1000), (300, 544)):
        weight, keep = awkward(rows, columns)
        weight[:, :group] = 0  # scales of zero
        made = quantize_absmax(weight, keep, bits, group)
        lowest = torch.where(keep & (torch.rand(keep.shape) < 0.1), -(2 ** (bits - 1)), made.codes).to(torch.int8)
        made = QuantizedWeight(lowest, made.scales, bits, group)
        blocks = integer.pack(made, keep)
        kernel = library().kernel(integer.Layout(bits, group).wide, isa)
        dense = integer.unpack(blocks, rows, columns).bfloat16()
        if kernel.block_columns == integer.layout_of(columns, bits, group).group:
            compare(lambda x, bias, k=kernel, b=blocks, r=rows: library().linear(k, x, b, bias, r), dense, isa)


@pytest.mark.parametrize("shape", [*SHAPES, (20, 3)], ids=str)
def test_unstructured_errs_no_more_than_twice_what_torch_errs(isa, shape):
    keep = torch.rand(shape) < torch.linspace(1.0, 0.0, shape[0]).unsqueeze(1)  # from all kept to none
    weight = (torch.randn(shape) / shape[1] ** 0.5).bfloat16().masked_fill(~keep, 0)
    blocks, kernel = bitmask.pack(weight, keep), library().kernel("bitmaskwide", isa)
    compare(lambda x, bias: library().linear(kernel, x, blocks, bias, shape[0]), weight, isa)


def test_both_operators_of_quantised_weights_take_it(awkward):
    if "amx" not in library().isas:
        pytest.skip(library().refused["amx"])
    weight, keep = awkward(64, 256)
    made = quantize_absmax(weight, keep, 4, 64)
    blocks, x = integer.pack(made, keep), torch.randn(40, 256).bfloat16()
    results = [integer.linear(x, blocks, None, 64, exact) for exact in (True, False)]
    assert torch.equal(*results)
    exact = x.double() @ made.dequantize().bfloat16().double().T
    assert (results[0] - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_sums_and_outputs_of_float32(awkward, isa):
    weight, keep = awkward(50, 600)
    x, bias = torch.randn(19, 600).bfloat16().float(), torch.randn(50)
    got = library().linear(library().kernel("bf16wide", isa), x, bf16.pack(weight, keep), bias, 50)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= 1e-5 * exact.norm()


def test_more_tokens_than_are_held_at_once(awkward):
    weight, keep = awkward(70, 100)
    x, blocks = torch.randn(1100, 100).bfloat16(), bf16.pack(weight, keep)
    y = bf16.linear(x, blocks, None, 70)
    assert torch.equal(torch.cat([bf16.linear(part, blocks, None, 70) for part in x.split(275)]), y)
    assert (y - x.double() @ weight.double().T).abs().max() < 0.2


def test_the_number_of_threads_changes_no_bit(awkward):
    weight, keep = awkward(1000, 1056)
    blocks = bf16.pack(weight, keep)
    for tokens in (9, 20, 140):
        x = torch.randn(tokens, 1056).bfloat16()
        same_on_any_threads(lambda x=x: bf16.linear(x, blocks, None, 1000))
    unstructured = bitmask.pack(weight, keep)
    same_on_any_threads(lambda: bitmask.linear(x, unstructured, None, 1000))
    quantised = integer.pack(quantize_absmax(weight, keep, 8, 32), keep)
    same_on_any_threads(lambda: integer.linear(x, quantised, None, 1000, exact=False))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_input_that_is_not_finite_reaches_all_outputs_of_its_token_and_no_others(isa, value):
    keep = torch.zeros(40, 64, dtype=torch.bool)
    keep[:, 0::4] = True
    x = torch.ones(20, 64).bfloat16()
    x[17, 22] = value
    kernel = library().kernel("bf16wide", isa)
    y = library().linear(kernel, x, bf16.pack(torch.ones(40, 64).bfloat16() * keep, keep), None, 40)
    assert not y[17].isfinite().any()
    assert torch.equal(y[torch.arange(20) != 17], torch.full((19, 40), 16.0).bfloat16())


def test_unstructured_with_many_tokens_compiles_into_one_graph():
    keep = torch.rand(40, 300) < 0.5
    blocks = bitmask.pack(torch.randn(40, 300).bfloat16().masked_fill(~keep, 0), keep)

    def model(x):
        return torch.relu(bitmask.linear(x, blocks, None, 40))

    x = torch.randn(100, 300).bfloat16()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
