"""The bf16 2:4 format: bits and products against the weight it was made of."""

import pytest
import torch
from torch.nn import functional

from compressllm.core.errors import PatternError
from compressllm.core.masks import raw
from compressllm.kernels.native import bf16
from compressllm.kernels.native.library import library

SHAPES = [(64, 128), (16, 4), (1, 36), (33, 40), (50, 1000), (300, 4096), (48, 14336)]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 131]  # a tile has up to 8, what is prepared at a time up to 128
ISAS = ["scalar", "avx2", "avx512", "neon"]


@pytest.fixture(params=ISAS)
def kernel(request):
    if request.param not in library().isas:
        pytest.skip(f"{request.param}: {library().refused[request.param]}")
    return library().kernel("bf16", request.param)


def layout(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """What `pack` should give, by the words of c/kernel.h; slow."""
    rows, columns = weight.shape
    blocks = torch.zeros(-(-rows // 16), -(-columns // 32), 144, dtype=torch.int64)
    values = raw(weight).long() & 0xFFFF
    pairs = {(0, 1): (0, 1), (0, 2): (0, 2), (0, 3): (3, 0), (1, 2): (1, 2), (1, 3): (1, 3), (2, 3): (2, 3)}
    fill = {(): (0, 1), (0,): (0, 1), (1,): (0, 1), (2,): (0, 2), (3,): (3, 0)}
    for row in range(rows):
        for column in range(0, columns, 4):
            kept = tuple(keep[row, column : column + 4].nonzero().flatten().tolist())
            first, second = (pairs | fill)[kept]
            block, group = blocks[row // 16, column // 32], column % 32 // 4
            block[row % 16] |= (first | second << 2) << 4 * group
            block[16 + 16 * group + row % 16] = values[row, column + first] | values[row, column + second] << 16
    return torch.where(blocks >= 1 << 31, blocks - (1 << 32), blocks).int()


@pytest.mark.parametrize("shape", [(16, 32), (21, 100)], ids=str)
def test_the_layout_is_the_documented_one(awkward, shape):
    weight, keep = awkward(*shape)
    assert torch.equal(bf16.pack(weight, keep), layout(weight, keep))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_every_bit_back(awkward, shape):
    weight, keep = awkward(*shape)
    assert (raw(weight) == raw(torch.tensor(-0.0).bfloat16())).any() or weight.numel() < 100
    assert torch.equal(raw(bf16.unpack(bf16.pack(weight, keep), *shape)), raw(weight))


def test_takes_strided_weights_and_any_bits(awkward):
    weight, keep = awkward(40, 64)
    weight[keep] = torch.randint(-(2**15), 2**15, weight[keep].shape).short().view(torch.bfloat16)  # NaN and all
    wide = torch.zeros(40, 128, dtype=torch.bfloat16)
    raw(wide)[:, ::2] = raw(weight)
    assert torch.equal(raw(bf16.unpack(bf16.pack(wide[:, ::2], keep), 40, 64)), raw(weight))


def test_refuses_what_is_not_2_of_4(awkward):
    weight, keep = awkward(16, 32)
    keep[3, 4:8] = True
    with pytest.raises(PatternError, match="1 groups of 4 keep more than 2 weights"):
        bf16.pack(weight, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_twice_what_torch_errs(awkward, kernel, shape, dtype):
    weight, keep = awkward(*shape)
    blocks = bf16.pack(weight, keep)
    bias = torch.randn(shape[0]).to(dtype)
    ours, torchs = [], []
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1]).to(dtype)
        for added in (None, bias):
            exact = functional.linear(x.double(), weight.double(), None if added is None else added.double())
            got = library().linear(kernel, x, blocks, added, shape[0])
            assert got.dtype == dtype
            ours.append((got - exact).flatten())
            torchs.append((functional.linear(x, weight.to(dtype), added) - exact).flatten())
    # Over all token counts: the largest error of one small product is a matter of luck.
    ours, torchs = torch.cat(ours), torch.cat(torchs)
    assert ours.norm() <= 2 * torchs.norm()
    assert ours.abs().max() <= 2 * torchs.abs().max()


def test_the_number_of_threads_changes_no_bit(awkward):
    weight, keep = awkward(1000, 512)
    blocks = bf16.pack(weight, keep)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 5, 140):
            x = torch.randn(tokens, 512).bfloat16()
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(bf16.linear(x, blocks, None, 1000))
            assert all(torch.equal(one, results[0]) for one in results)
            assert torch.equal(bf16.pack(weight, keep), blocks)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_input_that_is_not_finite_reaches_the_rows_that_keep_its_column(kernel, value):
    keep = torch.zeros(32, 64, dtype=torch.bool)
    keep[:, 0::4] = keep[:, 1::4] = True
    keep[7, 20:24] = torch.tensor([False, True, True, False])  # the one row that keeps column 22
    weight = torch.ones(32, 64).bfloat16().masked_fill(~keep, 0)
    x = torch.ones(2, 64)
    x[1, 22] = value
    y = library().linear(kernel, x, bf16.pack(weight, keep), None, 32)
    assert torch.equal(y[0], torch.full((32,), 32.0))
    assert torch.equal(y[1, 7], torch.tensor(value)) or y[1, 7].isnan() == torch.tensor(value).isnan()
    assert y[1, torch.arange(32) != 7].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_shows(kernel, value):
    keep = torch.zeros(16, 8, dtype=torch.bool)
    keep[:, :2] = True
    weight = torch.zeros(16, 8).bfloat16()
    weight[3, 1] = value
    y = library().linear(kernel, torch.ones(1, 8).bfloat16(), bf16.pack(weight, keep), None, 16)
    assert not y[0, 3].isfinite()
    assert y[0, torch.arange(16) != 3].isfinite().all()


def test_rounds_once_to_nearest_even():
    weight = torch.zeros(16, 4).bfloat16()
    weight[:, 0] = 1.0
    weight[:8, 1] = 2**-8  # half a unit in the last place of 1.0
    weight[0, 1] = 2**-8 + 2**-15
    y = bf16.linear(torch.ones(1, 4).bfloat16(), bf16.pack(weight, weight != 0), None, 16)
    assert torch.equal(y[0], weight.float().sum(1).bfloat16())
    assert y[0, 0] > y[0, 1] == 1.0


def test_shapes_and_dtypes_that_do_not_fit(awkward):
    weight, keep = awkward(33, 40)
    blocks = bf16.pack(weight, keep)
    with pytest.raises(RuntimeError, match=r"need \(3, 4\) blocks, not \(3, 2\)"):
        bf16.linear(torch.zeros(1, 100), blocks, None, 33)
    with pytest.raises(RuntimeError, match=r"and a bias of \(33,\)"):
        bf16.linear(torch.zeros(1, 40), blocks, torch.zeros(32), 33)
    with pytest.raises(RuntimeError, match="take float32 and bfloat16 inputs"):
        bf16.linear(torch.zeros(1, 40).double(), blocks, None, 33)
    half = bf16.linear(torch.ones(1, 40).half(), blocks, None, 33)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, weight.double().sum(1)[None].half(), rtol=1e-2, atol=1e-3)


def test_compiles_into_one_graph(awkward):
    weight, keep = awkward(33, 40)
    blocks = bf16.pack(weight, keep)

    def model(x):
        return torch.relu(bf16.linear(x * 2, blocks, None, 33)) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (1, 3, 9):
        x = torch.randn(tokens, 40)
        assert torch.equal(compiled(x), model(x))


def test_is_a_well_formed_operator(awkward):
    weight, keep = awkward(33, 40)
    arguments = (torch.randn(2, 3, 40), bf16.pack(weight, keep), torch.randn(33), 33)
    torch.library.opcheck(torch.ops.compressllm.bf16_linear.default, arguments)
