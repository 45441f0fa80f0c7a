"""The Triton kernel in triton's interpreter, on a CPU, and what it compiles to."""

import importlib.util
import re

import pytest
import torch
from torch.nn import functional

from compressllm.core.errors import BackendUnavailableError
from compressllm.core.masks import raw
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.quantized import quantize_absmax
from compressllm.kernels import decode_gpu
from compressllm.kernels.decode_gpu import Triton
from compressllm.kernels.gpu.configs import Config, candidates, default_config
from compressllm.kernels.linear import SparseLinear

PATTERN = NM(2, 4)


def load_kernel():
    """The kernel's module, made anew: whether it is interpreted is decided when it is run."""
    spec = importlib.util.find_spec("compressllm.kernels.gpu.triton_matmul")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def interpreter(monkeypatch):
    pytest.importorskip("triton", reason="needs the package triton; pip install compressllm[triton]")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = load_kernel()
    monkeypatch.setattr(decode_gpu, "_kernel", lambda: module)
    return module


def sparse(shape, dtype, pattern=PATTERN):
    torch.manual_seed(0)
    weight = torch.randn(shape) / shape[1] ** 0.5
    keep = pattern.keep(weight.abs())
    keep[0, :64] = False
    return weight.masked_fill(~keep, 0).to(dtype), keep


def assert_as_close_as_dense(x, weight, packed, bias):
    """Within twice what torch errs with the same weights, rounded to the dtype of ``x`` where they do not fit it."""
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    dense_error = (functional.linear(x, weight.to(x.dtype), bias) - exact).abs().max()
    got = Triton().linear(x, packed, bias)
    assert got.dtype == x.dtype
    assert (got - exact).abs().max() <= 2 * dense_error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 16, 33])
@pytest.mark.parametrize("shape", [(64, 512), (70, 576), (128, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(interpreter, dtype, shape, tokens, bias):
    weight, keep = sparse(shape, dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    assert_as_close_as_dense(x, weight, Triton().pack(weight, keep), torch.randn(shape[0]).to(dtype) if bias else None)


@pytest.mark.parametrize("columns", [512, 584])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_integers(interpreter, dtype, bits, group, columns):
    weight, keep = sparse((40, columns), dtype)
    quantized = quantize_absmax(weight, keep, bits, group or columns)
    quantized.codes[2].masked_fill_(keep[2], -(1 << (bits - 1)))  # the lowest code there is
    packed, x = Triton().pack(quantized, keep), torch.randn(5, columns).to(dtype)
    exact = quantized.dequantize(torch.float32)
    assert torch.equal(Triton().unpack(packed, columns), exact)
    assert_as_close_as_dense(x, exact, packed, torch.randn(40).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_float8(interpreter, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(1.0).repeat(4)
    keep = PATTERN.keep(torch.rand(16, 1024, generator=torch.Generator().manual_seed(0)))
    weight = every.expand(16, -1).masked_fill(~keep, 0).to(torch.float8_e4m3fn)
    packed = Triton().pack(weight, keep)
    assert torch.equal(raw(Triton().unpack(packed, 1024)), raw(weight))
    x = torch.eye(1024, dtype=dtype)[::7]  # picks single weights, subnormal ones too
    assert torch.equal(Triton().linear(x, packed, None), weight.to(dtype).T[::7])


def test_splits_are_added_up(interpreter):
    weight, keep = sparse((64, 2048), torch.float16)
    x, bias, packed = torch.randn(2, 2048).half(), torch.randn(64).half(), Triton().pack(weight, keep)
    args = (x, packed["values"], packed["meta"], None, bias, 16, -1)
    once, *others = (interpreter.matmul(*args, Config(64, splits, 4, 2)) for splits in (1, 2, 4))
    for other in others:
        torch.testing.assert_close(other, once, rtol=2e-3, atol=2e-3)
    assert torch.equal(interpreter.matmul(*args, Config(64, 4, 4, 2)), others[-1])


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(1, 2), NM(2, 8)], ids=str)
def test_sparser_patterns(interpreter, pattern):
    weight, keep = sparse((16, 512), torch.float16, pattern)
    packed = Triton().pack(weight, keep)
    assert torch.equal(raw(Triton().unpack(packed, 512)), raw(weight))
    assert_as_close_as_dense(torch.randn(2, 512).half(), weight, packed, None)


def test_any_leading_dimensions_and_none(interpreter):
    weight, keep = sparse((48, 72), torch.float16)
    packed, x = Triton().pack(weight, keep), torch.randn(2, 3, 72).half()
    torch.testing.assert_close(Triton().linear(x, packed, None), functional.linear(x, weight), rtol=2e-3, atol=2e-3)
    assert Triton().linear(x[0, 0], packed, None).shape == (48,)
    assert Triton().linear(x[:0], packed, None).shape == (0, 3, 48)


def test_compiles_whole_and_survives_a_cast(interpreter):
    weight, keep = sparse((32, 512), torch.bfloat16)
    for packable in (weight, quantize_absmax(weight, keep, 4, 64)):
        linear = SparseLinear(packable, keep, None, PATTERN, "triton")
        x = torch.randn(2, 512, dtype=torch.bfloat16)
        expected = linear(x)
        assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.allclose(linear.half()(x.half()), expected.half(), atol=0.05)
        with pytest.raises(BackendUnavailableError, match="activations are torch"):
            linear(x.float())


def test_is_a_sound_operator(interpreter):
    weight, keep = sparse((32, 512), torch.bfloat16)
    for packable in (weight, quantize_absmax(weight, keep, 4, 64)):
        packed, x = Triton().pack(packable, keep), torch.randn(2, 512, dtype=torch.bfloat16)
        scales = packed["scales"].view(torch.float32) if "scales" in packed else None
        arguments = (x, packed["values"], packed["meta"], scales, torch.randn(32))
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.compressllm.triton_2to4.default, arguments, test_utils=checks)


def test_refusals(monkeypatch):
    weight = torch.zeros(16, 64, dtype=torch.bfloat16)
    triton = Triton()
    assert triton.refuses(weight, PATTERN) == "runs on CUDA devices; the weight is on cpu"
    assert "at most 2 in every 4" in triton.refuses(weight, NM(4, 8))
    assert "at most 2 in every 4" in triton.refuses(weight, Unstructured(0.5))
    assert "not torch.float32" in triton.refuses(weight.float(), PATTERN)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    on = torch.device("cuda:0")
    for capability, reason in {(7, 5): "8.0 or more, not a card", (9, 0): None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        got = decode_gpu.unavailable(on)
        assert got is None if reason is None else reason in got
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in decode_gpu.unavailable(on)


def test_configs():
    for rows, tiles in ((4096, 8), (14336, 8), (4096, 28), (1024, 8), (64, 1), (100, 43)):
        for tokens in (1, 16, 256):
            for bits in (16, 8, 4):
                config = default_config(rows, tiles, tokens, bits, processors=132, shared=227 << 10)
                assert tiles % config.splits == 0
                assert config in candidates(tiles, bits, config)
    assert default_config(4096, 8, 1, 16, 132, 227 << 10).splits == 4
    assert default_config(14336, 8, 256, 16, 132, 227 << 10).splits == 1


@pytest.mark.parametrize(("bits", "float8", "group"), [(16, False, -1), (8, False, 0), (8, True, -1), (4, False, 128)])
def test_decodes_in_registers_on_hopper(bits, float8, group, tmp_path, monkeypatch):
    """Decoded weights do not pass through shared memory there, and all loads but those of scales are asynchronous."""
    triton = pytest.importorskip("triton", reason="needs the package triton; pip install compressllm[triton]")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    types = {"x": "*bf16", "values": "*u32", "meta": "*u32", "scales": "*fp32", "bias": "*bf16", "out": "*fp32"}
    numbers = ("tokens", "rows", "columns", "tiles", "groups")
    brain = triton.language.bfloat16
    constants = {
        "tiles_a_split": 4, "bits": bits, "float8": float8, "carrier": brain, "compute": brain, "group": group,
        "has_bias": False, "ragged": False, "block_rows": 64, "block_tokens": 16,
    }  # fmt: skip
    signature = {f"{name}_ptr": kind for name, kind in types.items()} | dict.fromkeys(numbers, "i32")
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 5, 7, 8)}
    source = ASTSource(
        load_kernel().matmul_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    stages = default_config(4096, 8, 1, bits, 132, 227 << 10).stages
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": stages})
    loop = re.search(r"scf\.for.*?scf\.yield", compiled.asm["ttgir"], re.DOTALL)[0]
    assert loop.count("warp_group_dot ") == 16  # 8 lanes, 2 products
    assert "convert_layout" not in loop
    assert loop.count("tt.load") == (8 if group > 0 else 0)  # scales
    assert compiled.metadata.shared <= 76 << 10  # three of them on a multiprocessor
