"""Every registered format gives back, bit for bit, what it was given."""

import pytest
import torch

from compressllm.core.masks import raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.protocols import FORMATS
from compressllm.core.registry import build

PATTERNS = [
    NM(1, 4),
    NM(2, 4),
    NM(4, 8),
    NM(3, 5),
    NM(16, 32),
    Unstructured(0.5, "row"),
    Unstructured(0.7, "layer"),
    Unstructured(1.0, "row"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(6, 32), (5, 20), (7, 160), (1, 37), (3, 1)]


def awkward(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random bytes, NaN and infinities included, with rows of zeros and of negative zeros."""
    torch.manual_seed(0)
    weight = torch.randint(0, 256, (shape[0], shape[1] * dtype.itemsize), dtype=torch.uint8).view(dtype)
    if shape[0] > 2:
        weight[1] = 0
        raw(weight)[2] = raw(torch.tensor([-0.0]).to(dtype))
    return weight


def masks(shape: tuple[int, int]) -> list[torch.Tensor]:
    """What patterns choose, and masks no pattern would: groups of none and of one, a row of none, everything."""
    torch.manual_seed(1)
    chosen = [pattern.keep(torch.rand(shape)) for pattern in PATTERNS if pattern.refuses(shape) is None]
    sparse = torch.rand(shape) < 0.2
    sparse[0] = False
    return [*chosen, sparse, torch.ones(shape, dtype=torch.bool)]


def test_there_are_formats():
    assert {"dense", "packed"} <= set(FORMATS.names())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS.names())
def test_round_trip(name, shape, dtype):
    chosen, weight = build(FORMATS, name), awkward(shape, dtype)
    for keep in masks(shape):
        before = raw(weight).clone()
        expected = before.masked_fill(~keep, 0)  # all bits zero: +0.0, never -0.0
        tensors = dict(chosen.pack("a.b", weight, keep))
        assert set(tensors) == {f"a.b.{part}" for part in chosen.tensors}
        assert chosen.layout("a.b", dtype, keep) == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        assert tensors[f"a.b.{chosen.tensors[0]}"].dtype == dtype
        back = chosen.unpack("a.b", tensors.__getitem__, shape)
        assert back.dtype == dtype
        assert torch.equal(raw(back), expected)
        mask = chosen.mask("a.b", tensors.__getitem__, shape)
        assert mask is None or torch.equal(mask, keep)
        assert torch.equal(raw(weight), before)  # the argument is left as it was


@pytest.mark.parametrize("name", FORMATS.names())
def test_takes_parameters_and_strided_weights(name):
    chosen = build(FORMATS, name)
    weight = torch.nn.Parameter(torch.randn(16, 8).T)  # (8, 16), columns apart
    keep = NM(2, 4).keep(weight.abs())
    tensors = dict(chosen.pack("l", weight, keep))
    assert torch.equal(chosen.unpack("l", tensors.__getitem__, (8, 16)), weight.detach().masked_fill(~keep, 0))
