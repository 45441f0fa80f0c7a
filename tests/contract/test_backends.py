"""Every registered backend computes the linear it was given, about as well as torch does."""

import pytest
import torch
from torch.nn import functional

from compressllm.core.masks import raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import BACKENDS
from compressllm.core.quantized import quantize_absmax
from compressllm.core.registry import build

PATTERNS = [NM(2, 4), NM(4, 8), NM(1, 4), Unstructured(0.5, "row"), Unstructured(0.7, "layer")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (48, 72), (33, 40)]


def sparse(shape, pattern, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape) / shape[1] ** 0.5).to(dtype)
    keep = pattern.keep(weight.float().abs())
    return weight.masked_fill(~keep, 0), keep


def ready(name, weight, pattern):
    backend = build(BACKENDS, name)
    if reason := backend.refuses(weight, pattern, wanted=True):
        pytest.skip(f"{name}: {reason}")
    return backend


def test_there_are_backends():
    assert {"dense", "reference"} <= set(BACKENDS.names())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS.names())
def test_backend_is_as_close_as_dense(name, shape, pattern, dtype):
    weight, keep = sparse(shape, pattern, dtype)
    backend = ready(name, weight, pattern)
    packed = backend.pack(weight, keep)
    for rows in (1, 7, 33):  # one token, and ragged batches
        x = torch.randn(rows, shape[1]).to(dtype)
        for bias in (None, torch.randn(shape[0]).to(dtype)):
            exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            dense_error = (functional.linear(x, weight, bias) - exact).abs().max()
            got = backend.linear(x, packed, bias)
            assert got.dtype == dtype
            assert (got - exact).abs().max() <= 2 * dense_error


def half_steps(x, weight):
    """What rounding each token's inputs to int8, in spans of 32, can change of the outputs."""
    spans = functional.pad(x.double(), (0, -x.shape[1] % 32)).view(x.shape[0], -1, 32)
    half = (spans.abs().amax(-1) / 254).repeat_interleave(32, 1)[:, : x.shape[1]]
    return functional.linear(half, weight.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6, "row")], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, 200])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BACKENDS.names())
def test_backend_computes_from_a_quantised_weight(name, bits, group, pattern, dtype):
    weight, keep = sparse((48, 200), pattern, dtype)
    quantized = quantize_absmax(weight, keep, bits, group)
    backend = ready(name, quantized, pattern)
    packed = backend.pack(quantized, keep)
    exact_weight = quantized.dequantize(torch.float64)
    if name != "dense":  # which rounds it
        assert torch.equal(backend.unpack(packed, 200).double(), exact_weight)
    x = torch.randn(33, 200).to(dtype)
    for bias in (None, torch.randn(48).to(dtype)):
        exact = functional.linear(x.double(), exact_weight, None if bias is None else bias.double())
        allowed = 2 * (functional.linear(x, quantized.dequantize(), bias) - exact).abs().max()
        if getattr(backend, "exact", True) is False:  # it says that it rounds its inputs
            allowed = allowed + half_steps(x, exact_weight)
        for tokens in (1, 7, 33):
            got = backend.linear(x[:tokens], packed, bias)
            assert got.dtype == dtype
            assert ((got - exact[:tokens]).abs() <= (allowed + torch.zeros_like(exact))[:tokens]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", BACKENDS.names())
def test_backend_gives_its_weight_back(name, pattern, dtype):
    weight, keep = sparse((48, 72), pattern, dtype)
    backend = ready(name, weight, pattern)
    packed = backend.pack(weight, keep)
    assert all(isinstance(tensor, torch.Tensor) for tensor in packed.values())
    assert torch.equal(raw(backend.unpack(packed, 72)), raw(weight))


@pytest.mark.parametrize("name", BACKENDS.names())
def test_backend_takes_any_number_of_leading_dimensions(name):
    weight, keep = sparse((48, 72), NM(2, 4), torch.float32)
    backend = ready(name, weight, NM(2, 4))
    packed = backend.pack(weight, keep)
    x = torch.randn(2, 3, 5, 72)
    torch.testing.assert_close(backend.linear(x, packed, None), functional.linear(x, weight))
    assert backend.linear(x[0, 0, 0], packed, None).shape == (48,)
    assert backend.linear(x[:0], packed, None).shape == (0, 3, 5, 48)
