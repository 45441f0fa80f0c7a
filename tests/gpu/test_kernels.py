"""The GPU backends on a GPU: against torch's own products, in CUDA graphs and compiled."""

import pytest
import torch
from torch.nn import functional

from compressllm.core.masks import raw
from compressllm.core.pattern import NM
from compressllm.core.quantized import QuantizedWeight, quantize_absmax
from compressllm.kernels import cusparselt, decode_gpu, sparse_mma
from compressllm.kernels.cusparselt import CuSparseLt
from compressllm.kernels.decode_gpu import Triton
from compressllm.kernels.gpu.configs import Config, candidates
from compressllm.kernels.linear import SparseLinear
from compressllm.kernels.sparse_mma import SparseMma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATTERN = NM(2, 4)
SIXTEEN = [torch.bfloat16, torch.float16]
BACKENDS = {"cusparselt": CuSparseLt, "triton": Triton, "sparse-mma": SparseMma}
FEW_TOKENS = {"triton": Triton, "sparse-mma": SparseMma}
#: What an 8-bit rounding of activations adds, as a share of the result's norm.
ROUNDING = {torch.int8: 0.02, torch.float8_e4m3fn: 0.05}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path))
    for module in (cusparselt, decode_gpu, sparse_mma):
        module._choices.cache_clear()
    yield
    for module in (cusparselt, decode_gpu, sparse_mma):
        module._choices.cache_clear()


def sparse(shape, dtype, device="cuda"):
    torch.manual_seed(0)
    weight = torch.randn(shape, device=device) / shape[1] ** 0.5
    keep = PATTERN.keep(weight.abs())
    keep[0, :64] = False
    return weight.masked_fill(~keep, 0).to(dtype), keep


def packed_by(backend, weight, keep):
    if reason := backend.refuses(weight, PATTERN, wanted=True):
        pytest.skip(reason)
    return backend.pack(weight, keep)


def errors(backend, packed, weight, x, bias):
    """Largest error of the backend, and of torch with the same weights, against float64."""
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    dense = functional.linear(x, weight.to(x.dtype), bias)
    got = backend.linear(x, packed, bias)
    assert got.dtype == x.dtype
    assert got.isfinite().all()
    return (got - exact).abs().max(), (dense - exact).abs().max(), (got - exact).norm() / exact.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 33, 256])
@pytest.mark.parametrize("shape", [(64, 512), (1024, 4096), (4096, 1536), (80, 608)], ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_16_bits(name, dtype, shape, tokens, bias):
    weight, keep = sparse(shape, dtype)
    backend, x = BACKENDS[name](), torch.randn(tokens, shape[1], device="cuda").to(dtype)
    packed = packed_by(backend, weight, keep)
    bias = torch.randn(shape[0], device="cuda").to(dtype) if bias else None
    error, dense_error, _ = errors(backend, packed, weight, x, bias)
    assert error <= 2 * dense_error
    assert torch.equal(raw(backend.unpack(packed, shape[1])), raw(weight))


@pytest.mark.parametrize("columns", [512, 4096, 672])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", FEW_TOKENS)
def test_integers(name, dtype, bits, group, columns):
    weight, keep = sparse((320, columns), dtype)
    quantized = quantize_absmax(weight, keep, bits, group or columns)
    backend, exact = FEW_TOKENS[name](), quantized.dequantize(torch.float32)
    packed = packed_by(backend, quantized, keep)
    assert torch.equal(backend.unpack(packed, columns), exact)
    for tokens in (1, 16, 40):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        error, dense_error, _ = errors(backend, packed, exact, x, torch.randn(320, device="cuda").to(dtype))
        assert error <= 2 * dense_error


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", FEW_TOKENS)
def test_every_float8(name, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(1.0).repeat(4)
    keep = PATTERN.keep(torch.rand(64, 1024))
    weight = every.expand(64, -1).masked_fill(~keep, 0).to(torch.float8_e4m3fn).cuda()
    backend = FEW_TOKENS[name]()
    packed = packed_by(backend, weight, keep.cuda())
    x = torch.eye(1024, dtype=dtype, device="cuda")  # picks single weights, subnormal ones too
    assert torch.equal(backend.linear(x, packed, None), weight.to(dtype).T)


@pytest.mark.parametrize("tokens", [1, 16, 33, 256])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_8_bits_in_cusparselt(dtype, tokens):
    weight, keep = sparse((1024, 4096), torch.bfloat16)
    weight = quantize_absmax(weight, keep, 8, 4096) if dtype == torch.int8 else weight.to(dtype)
    packed = packed_by(CuSparseLt(), weight, keep)
    exact = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    _, _, share = errors(CuSparseLt(), packed, exact, x, torch.randn(1024, device="cuda", dtype=torch.bfloat16))
    assert share <= ROUNDING[dtype]
    # Not bit by bit: some hundred kept weights are so small that float8 makes them -0.0, which comes back as 0.0.
    assert torch.equal(CuSparseLt().unpack(packed, 4096).float(), exact.float())


@pytest.mark.parametrize("name", BACKENDS)
def test_captured_in_a_cuda_graph(name):
    weight, keep = sparse((1024, 2048), torch.bfloat16)
    backend, x = BACKENDS[name](), torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    packed = packed_by(backend, weight, keep)
    backend.linear(x, packed, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backend.linear(x, packed, None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(got, backend.linear(x, packed, None))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_whole(name, mode):
    weight, keep = sparse((512, 1024), torch.bfloat16)
    packed_by(BACKENDS[name](), weight, keep)
    for packable in (weight, weight.to(torch.float8_e4m3fn), quantize_absmax(weight, keep, 8, 1024)):
        if BACKENDS[name]().refuses(packable, PATTERN, wanted=True):
            continue
        linear = SparseLinear(packable, keep, None, PATTERN, name)
        compiled = torch.compile(linear, fullgraph=True, mode=mode)
        for _ in range(3):
            x = torch.randn(1, 3, 1024, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), linear(x), rtol=2e-2, atol=2e-2)
        torch.compiler.reset()


def test_every_config_of_triton_computes_the_same():
    weight, keep = sparse((200, 2048), torch.bfloat16)
    packed_by(Triton(), weight, keep)
    kernel, x = decode_gpu._kernel(), torch.randn(5, 2048, device="cuda", dtype=torch.bfloat16)
    for packable in (weight, quantize_absmax(weight, keep, 4, 128)):
        packed = Triton().pack(packable, keep)
        bits = decode_gpu.bits_of(packed["values"], packed["meta"])
        scales = packed["scales"].view(torch.float32) if "scales" in packed else None
        exact = functional.linear(x.double(), Triton().unpack(packed, 2048).double())
        for config in candidates(4, bits, Config(64, 2, 4, 2)):
            group = -1 if scales is None else 128
            arguments = (x, packed["values"], packed["meta"], scales, None, bits, group, config)
            try:
                once = kernel.matmul(*arguments)
            except kernel.OutOfResources:
                continue
            assert (once - exact).abs().max() <= 2**-7 * exact.abs().max()
            assert torch.equal(kernel.matmul(*arguments), once)


CONFIGS = [(1, 1, 1, 1, 0), (1, 1, 8, 2, 1), (2, 1, 4, 2, 0), (1, 2, 8, 1, 1), (2, 2, 8, 1, 0), (2, 2, 4, 2, 1)]


@pytest.mark.parametrize("configs", CONFIGS, ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_config_of_sparse_mma_computes_the_same(bits, configs):
    weight, keep = sparse((208, 2080), torch.bfloat16)
    quantized = weight if bits == 16 else quantize_absmax(weight, keep, bits, 128)
    packed, x = packed_by(SparseMma(), quantized, keep), torch.randn(21, 2080, device="cuda", dtype=torch.bfloat16)
    exact = functional.linear(x.double(), SparseMma().unpack(packed, 2080).double())
    scales = packed["scales"].view(torch.float32) if bits < 16 else None
    made = []
    for _ in range(2):
        out = torch.full((21, 208), float("nan"), device="cuda", dtype=torch.bfloat16)
        made.append(sparse_mma.compute(x, packed["fragments"], scales, None, out, sparse_mma.Config(*configs)))
    assert (made[0] - exact).abs().max() <= 2**-7 * exact.abs().max()
    assert torch.equal(*made)


@pytest.mark.parametrize("name", FEW_TOKENS)
def test_searches_when_told_to(monkeypatch, name):
    monkeypatch.setenv("COMPRESSLLM_SEARCH", "1")
    weight, keep = sparse((1024, 1024), torch.bfloat16)
    backend, x = FEW_TOKENS[name](), torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    packed = packed_by(backend, weight, keep)
    got = backend.linear(x, packed, None)
    assert {"triton": decode_gpu, "sparse-mma": sparse_mma}[name]._choices(x.device).path.exists()
    torch.testing.assert_close(got, functional.linear(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_second_gpu(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for device in ("cuda:0", "cuda:1"):
        weight, keep = sparse((256, 1024), torch.float16, device)
        backend, x = BACKENDS[name](), torch.randn(3, 1024, device=device).half()
        if backend.refuses(weight, PATTERN, wanted=True):
            continue  # one GPU a process, on older torch
        torch.testing.assert_close(
            backend.linear(x, backend.pack(weight, keep), None), functional.linear(x, weight), rtol=2e-3, atol=2e-3
        )
