"""The cuSPARSELt backend over a stand-in for the library, whose layout is known: kept values, then the mask."""

import pytest
import torch
from torch.nn import functional

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.masks import pack_bits, put_kept, raw, unpack_bits
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.kernels import cusparselt
from compressllm.kernels.cusparselt import CuSparseLt
from compressllm.kernels.gpu.layout import two_of_four
from compressllm.kernels.linear import SparseLinear

PATTERN = NM(2, 4)
SIXTEEN = [torch.bfloat16, torch.float16]


class Library:
    """What torch's operators do, and what they want."""

    def __init__(self):
        self.multiplied, self.searched = [], []

    def compress(self, weight):
        assert weight.is_contiguous()
        assert not any(size % (16 if weight.dtype.itemsize == 2 else 32) for size in weight.shape)
        keep = two_of_four(raw(weight) != 0)
        values = raw(weight).masked_select(keep).view(len(weight), -1).view(torch.uint8)
        return torch.cat((values, pack_bits(keep)), 1).view(weight.dtype)

    def check(self, compressed, dense, bias, alpha, out_dtype):
        tokens, eight = dense.shape[1], dense.dtype.itemsize == 1
        assert dense.dtype == compressed.dtype
        assert dense.T.is_contiguous(), "8-bit operands must be transposed views"
        assert tokens % (16 if eight else 8) == 0
        assert alpha is None
        allowed = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}
        assert out_dtype == allowed.get(dense.dtype)
        assert bias is None or (not eight and bias.dtype == dense.dtype and bias.shape == (len(compressed),))

    def multiply(self, compressed, dense, bias, alpha, out_dtype, *, transpose_result, alg_id, split_k, split_k_mode):
        self.check(compressed, dense, bias, alpha, out_dtype)
        assert transpose_result
        self.multiplied.append((dense.shape[1], (alg_id, split_k, split_k_mode)))
        columns, stored = len(dense), compressed.contiguous().view(torch.uint8)
        bytes_of_values = columns // 2 * dense.dtype.itemsize
        keep = unpack_bits(stored[:, bytes_of_values:], columns)
        weight = put_kept(stored[:, :bytes_of_values].contiguous().view(dense.dtype), keep)
        product = functional.linear(dense.T.double(), weight.double(), None if bias is None else bias.double())
        return product.to(out_dtype or dense.dtype)

    def search(self, compressed, dense, bias, alpha, out_dtype, transpose_result):
        self.check(compressed, dense, bias, alpha, out_dtype)
        assert transpose_result
        self.searched.append(dense.shape[1])
        return 7, 2, 1, 40


@pytest.fixture
def library(tmp_path, monkeypatch):
    made = Library()
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path))
    monkeypatch.delenv("COMPRESSLLM_SEARCH", raising=False)
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", made.multiply)
    monkeypatch.setattr(torch._C, "_cusparselt", type("Module", (), {"mm_search": made.search}), raising=False)
    monkeypatch.setattr(cusparselt, "_first_device", [])
    cusparselt._choices.cache_clear()
    yield made
    cusparselt._choices.cache_clear()


def sparse(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape) / shape[1] ** 0.5
    keep = PATTERN.keep(weight.abs())
    keep[0, :64] = False
    return weight.masked_fill(~keep, 0).to(dtype), keep


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 33, 256, 257])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_16_bits(library, dtype, tokens, bias):
    weight, keep = sparse((48, 64), dtype)
    x, bias = torch.randn(tokens, 64).to(dtype), torch.randn(48).to(dtype) if bias else None
    got = CuSparseLt().linear(x, CuSparseLt().pack(weight, keep), bias)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (functional.linear(x, weight, bias) - exact).abs().max()
    padded = {1: 8, 7: 8, 8: 8, 16: 16, 33: 64, 256: 256, 257: 320}[tokens]
    assert library.multiplied == [(padded, (7, 2, 1))]


@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_int8_with_a_scale_a_row(library, dtype, tokens):
    weight, keep = sparse((64, 96), dtype)
    quantized = quantize_absmax(weight, keep, 8, 96)
    x, bias = (3 * torch.randn(tokens, 96)).to(dtype), torch.randn(64).to(dtype)
    x[0] = 0  # a token of zeros has no largest value
    packed = CuSparseLt().pack(quantized, keep)
    got = CuSparseLt().linear(x, packed, bias)
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=2.0**-100)
    rounded = (x / scale).round() * scale
    expected = functional.linear(rounded.double(), quantized.dequantize(torch.float32).double(), bias.double())
    torch.testing.assert_close(got, expected.to(dtype))
    exact = functional.linear(x.double(), quantized.dequantize(torch.float32).double(), bias.double())
    assert (got - exact).norm() <= 0.02 * exact.norm()
    assert torch.equal(CuSparseLt().unpack(packed, 96), quantized.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_float8(library, dtype):
    weight, keep = sparse((64, 96), torch.float8_e4m3fn)
    packed, x = CuSparseLt().pack(weight, keep), (3 * torch.randn(5, 96)).to(dtype)
    bias = torch.randn(64).to(dtype)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    got = CuSparseLt().linear(x, packed, bias)
    assert got.dtype == dtype
    assert (got - exact).norm() <= 0.05 * exact.norm()
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).double() * scale
    torch.testing.assert_close(got, functional.linear(rounded, weight.double(), bias.double()).to(dtype))


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float8_e4m3fn], ids=str)
def test_gives_the_weight_back(library, monkeypatch, dtype):
    monkeypatch.setattr(cusparselt, "_AT_ONCE", 40)
    weight, keep = sparse((32, 96), dtype)
    assert torch.equal(raw(CuSparseLt().unpack(CuSparseLt().pack(weight, keep), 96)), raw(weight))


def test_searched_once_for_each_size_and_kept(library):
    weight, keep = sparse((32, 64), torch.bfloat16)
    packed = CuSparseLt().pack(weight, keep)
    for tokens in (1, 5, 8, 9, 16, 300, 400):
        CuSparseLt().linear(torch.randn(tokens, 64).bfloat16(), packed, None)
    assert library.searched == [8, 16, 320]
    assert library.multiplied[-1] == (448, (7, 2, 1))
    cusparselt._choices.cache_clear()  # another process
    CuSparseLt().linear(torch.randn(3, 64).bfloat16(), packed, None)
    assert library.searched == [8, 16, 320]


def test_may_be_told_not_to_search(library, monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_SEARCH", "0")
    weight, keep = sparse((32, 64), torch.bfloat16)
    CuSparseLt().linear(torch.randn(3, 64).bfloat16(), CuSparseLt().pack(weight, keep), None)
    assert library.multiplied == [(8, (0, 1, -1))]


def test_the_search_of_torch_without_the_new_one(library, monkeypatch):
    monkeypatch.delattr(torch._C, "_cusparselt")
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *args, transpose_result: 5)
    weight, keep = sparse((32, 64), torch.bfloat16)
    CuSparseLt().linear(torch.randn(3, 64).bfloat16(), CuSparseLt().pack(weight, keep), None)
    assert library.multiplied == [(8, (5, 1, -1))]


def test_compiles_whole_and_survives_a_cast(library):
    weight, keep = sparse((32, 64), torch.bfloat16)
    for packable in (weight, weight.to(torch.float8_e4m3fn), quantize_absmax(weight, keep, 8, 64)):
        linear, x = SparseLinear(packable, keep, None, PATTERN, "cusparselt"), torch.randn(2, 3, 64).bfloat16()
        expected = linear(x)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, expected)
        assert linear(x[:0]).shape == (0, 3, 32)
        linear.half()
        if packable is weight:
            with pytest.raises(
                BackendUnavailableError, match=r"activations are torch.float16.*packed as torch.bfloat16"
            ):
                linear(x.half())
        else:
            torch.testing.assert_close(linear(x.half()), expected.half(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_is_a_sound_operator(library, dtype):
    weight, keep = sparse((32, 64), torch.bfloat16)
    bias = torch.randn(32).to(dtype) if dtype == torch.bfloat16 else None
    compressed = CuSparseLt().pack(weight if bias is not None else quantize_absmax(weight, keep, 8, 64), keep)
    arguments = ((3 * torch.randn(5, 64)).to(dtype), compressed["compressed"], bias)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.compressllm.cusparselt_2to4.default, arguments, test_utils=checks)


def gpu(monkeypatch, capability=(9, 0), torch_version="2.11.0+cu130"):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", torch_version)


@pytest.mark.parametrize(
    ("capability", "version", "dtype", "wanted", "reason"),
    [
        ((9, 0), "2.11.0+cu130", torch.bfloat16, False, None),
        ((8, 0), "2.13.0", torch.int8, False, None),
        ((8, 9), "2.13.0", torch.float8_e4m3fn, False, None),
        ((8, 6), "2.13.0", torch.float8_e4m3fn, False, "capability 8.9 or more"),
        ((7, 5), "2.13.0", torch.float16, False, "capability 8.0 or more"),
        ((10, 0), "2.13.0", torch.float16, False, "not tested on compute capability 10.0"),
        ((10, 0), "2.13.0", torch.float16, True, None),
        ((9, 0), "2.10.1", torch.float16, False, "needs torch 2.11"),
    ],
)
def test_where_it_runs(monkeypatch, capability, version, dtype, wanted, reason):
    gpu(monkeypatch, capability, version)
    got = cusparselt._unavailable(torch.device("cuda:0"), dtype, wanted)
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize(("version", "refused"), [("2.11.0", True), ("2.14.1", True), ("2.15.0", False)])
def test_a_second_gpu_in_one_process(monkeypatch, version, refused):
    gpu(monkeypatch, torch_version=version)
    monkeypatch.setattr(cusparselt, "_first_device", [torch.device("cuda:0")])
    assert cusparselt._unavailable(torch.device("cuda:0"), torch.float16, False) is None
    got = cusparselt._unavailable(torch.device("cuda:1"), torch.float16, False)
    assert ("one process a GPU" in got) if refused else got is None


def test_refusals():
    refuses, weight = CuSparseLt().refuses, torch.zeros(32, 64, dtype=torch.bfloat16)
    assert refuses(weight, PATTERN) == "runs on CUDA devices; the weight is on cpu"
    assert "at most 2 in every 4" in refuses(weight, NM(4, 8))
    assert "at most 2 in every 4" in refuses(weight, Unstructured(0.5))
    assert "multiples of 16; this weight is 32 x 40" in refuses(weight[:, :40], PATTERN)
    assert "multiples of 32; this weight is 16 x 64" in refuses(weight[:16].to(torch.float8_e4m3fn), PATTERN)
    assert "not torch.float32" in refuses(weight.float(), PATTERN)
    assert "not torch.int8" in refuses(weight.to(torch.int8), PATTERN)
    codes = torch.zeros(32, 64, dtype=torch.int8)
    assert "one scale a row; this is int4" in refuses(QuantizedWeight(codes, torch.ones(32, 1), 4, 64), PATTERN)
    assert "a scale for 32 inputs" in refuses(QuantizedWeight(codes, torch.ones(32, 2), 8, 32), PATTERN)


def test_notes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    for version, told in ((800, True), (801, False)):
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda v=version: v)
        assert bool(cusparselt.notes(torch.device("cuda"))) == told
