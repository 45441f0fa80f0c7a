"""The quantised 2:4 formats: bits and products against the codes and scales they were made of."""

import pytest
import torch
from torch.nn import functional

from compressllm.core.errors import FormatError, PatternError
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.kernels.native import integer
from compressllm.kernels.native.library import library

TOKENS = [1, 2, 3, 5, 7, 8, 33]


def sparse(rows, columns, bits, group):
    """All pairs, groups of four with one kept weight and with none, a whole group of zeros, the lowest code."""
    torch.manual_seed(0)
    order = torch.rand(rows, columns // 4, 4).argsort(-1)
    kept = torch.randint(0, 5, (rows, columns // 4, 1)).clamp(max=2)
    keep = (order < kept).view(rows, columns)
    weight = torch.randn(rows, columns)
    weight[0, :group] = 0.0
    made = quantize_absmax(weight, keep, bits, group)
    made.codes[1] = torch.where(keep[1], -(2 ** (bits - 1)), 0)
    return made, keep


def packed(rows, columns, bits, group):
    made, keep = sparse(rows, columns, bits, group)
    return integer.pack(made, keep), made, keep


def rounded(x):
    """Inputs as the kernels round them: int8 in spans of 32, in the arithmetic they use, and then exact."""
    tokens, columns = x.shape
    spans = functional.pad(x.float(), (0, -columns % 32)).view(tokens, -1, 32)
    largest = spans.abs().amax(-1, keepdim=True)
    integers = (spans * (127.0 / largest)).nan_to_num(0.0).round()
    return (integers.double() * (largest / 127.0).double()).view(tokens, -1)[:, :columns]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_layout_is_the_documented_one(bits):
    """By the words of c/integer.h; slow."""
    blocks, made, keep = packed(21, 128, bits, 64)
    size = 32 + 2 * (64 + 32 * bits)
    want = torch.zeros(2, 2, size, dtype=torch.uint8)
    for row in range(21):
        for column in range(0, 128, 4):
            block, r = want[row // 16, column // 64], row % 16
            block[2 * r : 2 * r + 2] = made.scales[row, column // 64].half().view(1).view(torch.uint8)
            span = block[32:].view(2, -1)[column % 64 // 32]
            j, first_slot = column % 32 // 8, column % 8 // 4 * 2
            for i, position in enumerate(keep[row, column : column + 4].nonzero().flatten().tolist()):
                slot, code = 4 * r + first_slot + i, int(made.codes[row, column + position]) & (2**bits - 1)
                span[slot] |= position << 2 * j
                span[64 + (64 * j if bits == 8 else 64 * (j // 2)) + slot] |= code << (0 if bits == 8 else 4 * (j % 2))
    assert torch.equal(blocks, want)


@pytest.mark.parametrize("group", [32, 64, 128, "row"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (33, 72), (5, 4), (48, 576), (21, 300)])
def test_gives_its_weight_back(rows, columns, bits, group):
    blocks, made, _ = packed(rows, columns, bits, columns if group == "row" else group)
    assert torch.equal(integer.unpack(blocks, rows, columns), made.dequantize(torch.float32))


@pytest.mark.parametrize("isa", ["scalar", None])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_sums_of_integers_are_exact(bits, group, isa):
    made, keep = sparse(33, 260, bits, group)
    made = QuantizedWeight(made.codes, torch.full_like(made.scales, 0.5), bits, group)
    layout = integer.layout_of(260, bits, group)
    blocks, kernel = integer.pack(made, keep), library().kernel(layout.name, isa)
    for tokens in TOKENS:
        x = torch.randint(-127, 128, (tokens, 260)).float()
        x[:, ::32] = 127.0  # each span's scale is 1, and every sum fits float32
        y = library().linear(kernel, x, blocks, None, 33)
        assert torch.equal(y, (x.double() @ made.dequantize(torch.float64).T).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "group"), [(33, 512, 32), (16, 300, 64), (40, 1100, 128), (23, 72, 72)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("exact", [False, True])
def test_is_as_close_as_torch(exact, bits, rows, columns, group, dtype):
    blocks, made, _ = packed(rows, columns, bits, group)
    weight, bias = made.dequantize(torch.float64), torch.randn(rows).to(dtype)
    x = torch.randn(33, columns).to(dtype)
    x[:, 5] *= 100.0  # outliers: beside them, what is rounded loses most
    taken = x.double() if exact else rounded(x)
    right = taken @ weight.T + bias
    # In 16 bits torch would round the weights as well, so it is given float32 and rounds only the result.
    dense = functional.linear(taken.float(), weight.float(), bias.float()).to(dtype)
    allowed = 2 * (dense - right).abs().max()
    many = integer.MANY_EXACT if exact else integer.MANY_ROUNDED
    for tokens in TOKENS:
        if dtype == torch.bfloat16 and tokens >= many and "amx" in library().isas:
            continue  # another kernel, see test_wide.py
        y = integer.linear(x[:tokens], blocks, bias, rows, exact)
        assert y.dtype == dtype
        assert (y - right[:tokens]).abs().max() <= allowed


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_inputs_costs_at_most_half_a_step_each(bits):
    blocks, made, _ = packed(48, 512, bits, 64)
    weight = made.dequantize(torch.float64)
    x = torch.randn(7, 512)
    x[0, 3] = 100.0
    step = x.view(7, -1, 32).abs().amax(-1).div(127.0).repeat_interleave(32, 1)
    bound = (step.double() / 2) @ weight.abs().T
    error = (integer.linear(x, blocks, None, 48, exact=False) - x.double() @ weight.T).abs()
    assert (error <= bound * (1 + 1e-4) + 1e-4).all()
    assert error[1:].norm() < 0.007 * (x[1:].double() @ weight.T).norm()  # of normally distributed inputs


@pytest.mark.parametrize("exact", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(exact):
    blocks, *_ = packed(640, 1024, 4, 64)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 5, 33):
            x = torch.randn(tokens, 1024)
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(integer.linear(x, blocks, None, 640, exact))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_zeros_and_tiny_inputs():
    blocks, *_ = packed(16, 64, 8, 32)
    x = torch.zeros(2, 64)
    x[1, :3] = 1e-42  # no scale of theirs has an inverse
    assert torch.equal(integer.linear(x, blocks, None, 16, exact=False), torch.zeros(2, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value):
    made, keep = sparse(16, 64, 8, 32)
    keep[3, 8:12] = False
    made.codes[~keep] = 0
    blocks = integer.pack(made, keep)
    x = torch.randn(2, 64)
    x[1, 9] = value
    y = integer.linear(x, blocks, None, 16, exact=False)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_the_smallest_layout_is_taken():
    assert integer.layout_of(4096, 4, 128) == integer.Layout(4, 128)
    assert integer.layout_of(576, 4, 128) == integer.Layout(4, 64)  # 4.5 groups of 128
    assert integer.layout_of(72, 8, 64).group == 32
    assert integer.layout_of(4096, 8, 4096) == integer.Layout(8, 128)  # one scale a row


def test_what_the_layouts_cannot_hold():
    made, keep = sparse(16, 64, 4, 32)
    third = QuantizedWeight(made.codes, made.scales + 1e-6, 4, 32)
    with pytest.raises(FormatError, match=r"\(16, 64\): its scales must be float16"):
        integer.pack(third, keep)
    with pytest.raises(FormatError, match="codes of 4 bits are -8 to 7, not -8 to 9"):
        integer.pack(
            QuantizedWeight(made.codes.masked_fill(keep, 9).index_fill(0, torch.tensor([1]), -8), made.scales, 4, 32),
            keep,
        )
    keep[2, :4] = True
    with pytest.raises(PatternError, match="1 groups of 4 keep more than 2"):
        integer.pack(made, keep)


@pytest.mark.parametrize(
    "format", [layout.name + end for layout in integer._LAYOUTS.values() for end in ("", "_exact")]
)
def test_every_format_has_a_kernel_that_passes_its_check(format):
    best = [isa for isa in library().isas if isa in {"scalar", "avx2", "avx512vnni", "neon"}][-1]
    assert library().kernel(format).isa == best


def test_traced_by_torch_compile():
    blocks, *_ = packed(16, 64, 8, 32)
    x = torch.randn(2, 64)
    step = torch.compile(
        lambda x: integer.linear(x, blocks, None, 16, exact=False) * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(step(x), integer.linear(x, blocks, None, 16, exact=False) * 2)
