"""The kernel's own source on a CPU, one thread a lane, where mma.sp does what the PTX ISA says; and its layout."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from compressllm.core.masks import raw
from compressllm.core.pattern import NM
from compressllm.core.quantized import quantize_absmax
from compressllm.kernels import sparse_mma
from compressllm.kernels.gpu.fragments import pack_fragments, unpack_fragments
from compressllm.kernels.sparse_mma import Config, SparseMma, candidates, default_config, staged_bytes

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
PATTERN = NM(2, 4)


def sparse(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape) / shape[1] ** 0.5
    keep = PATTERN.keep(weight.abs())
    keep[0, :64] = False
    return weight.masked_fill(~keep, 0).to(dtype), keep


@pytest.mark.parametrize("shape", [(16, 256), (48, 608), (128, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_unpacking_gives_the_bits_that_were_packed(dtype, shape):
    weight, keep = sparse(shape, dtype)
    assert torch.equal(raw(SparseMma().unpack(SparseMma().pack(weight, keep), shape[1])), raw(weight))


@pytest.mark.parametrize("group", [32, 64, 128, 1024])
@pytest.mark.parametrize("bits", [8, 4])
def test_unpacking_integers(bits, group):
    weight, keep = sparse((32, 1024), torch.bfloat16)
    quantized = quantize_absmax(weight, keep, bits, group)
    packed = SparseMma().pack(quantized, keep)
    assert torch.equal(SparseMma().unpack(packed, 1024), quantized.dequantize(torch.float32))
    assert packed["fragments"].nbytes * 8 == (bits / 2 + 1) * weight.numel()


def test_every_byte_and_every_place_survives():
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(16, 2)
    for first, second in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        keep = torch.zeros(16, 512, dtype=torch.bool)
        keep[:, first::4] = keep[:, second::4] = True
        assert torch.equal(unpack_fragments(pack_fragments(codes, keep, 8), 16, 512, 8), codes * keep)


def test_what_is_computed_fits_on_the_gpu():
    for rows, columns, tokens in [(16, 8, 1), (1024, 4096, 1), (14336, 4096, 16), (4096, 14336, 9)]:
        config = default_config(rows, -(-columns // 256), tokens, processors=132, shared=227 << 10)
        assert 32 * config.warps <= 1024
        assert config.warps <= -(-columns // 256)
        assert config.row_tiles * 16 <= rows


class Emulated:
    """Stands for `nvrtc.Kernel`."""

    def __init__(self, folder, defines):
        library = folder / ("_".join(str(value) for value in defines.values()) + ".so")
        if not library.exists():
            flags = [f"-D{name}={value}" for name, value in defines.items()]
            include = Path(sparse_mma.__file__).parent / "gpu"
            command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{include}", *flags]
            subprocess.run([*command, "-o", library, HERE / "emulated.cpp"], check=True)
        self._library = ctypes.CDLL(library)

    def at_once(self, threads, shared):
        return 2  # so that a block has several turns

    def launch(self, grid, block, shared, *arguments):
        values = [a if isinstance(a, int) else ctypes.c_void_p(0 if a is None else a.data_ptr()) for a in arguments]
        self._library.run(*values, *grid)


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    if COMPILER is None:
        pytest.skip("needs g++")
    source = "#include <barrier>\nint main() { std::barrier<> one(1); return 0; }"
    command = [COMPILER, "-std=c++20", "-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode:
        pytest.skip("needs a g++ that knows std::barrier")
    monkeypatch.setattr(sparse_mma, "_processors", lambda device: 1)
    monkeypatch.setattr(sparse_mma, "_kernel", lambda device, name, *defines: Emulated(tmp_path, dict(defines)))


CASES = [  # kind, group, dtype, configuration, shape, tokens, bias
    ("16", 0, torch.bfloat16, Config(1, 1, 2, 1, 0), (32, 512), 1, False),
    ("16", 0, torch.float16, Config(2, 2, 2, 1, 1), (48, 608), 11, True),
    ("int8", 0, torch.bfloat16, Config(1, 1, 2, 2, 1), (80, 1280), 3, True),
    ("int8", 32, torch.float16, Config(1, 1, 1, 2, 0), (16, 608), 3, False),
    ("float8", 0, torch.bfloat16, Config(1, 1, 2, 1, 1), (32, 512), 8, False),
    ("float8", 0, torch.float16, Config(1, 1, 2, 1, 0), (16, 264), 2, False),
    ("int4", 128, torch.bfloat16, Config(1, 2, 2, 1, 0), (48, 576), 16, False),
    ("int4", 64, torch.float16, Config(1, 1, 2, 3, 1), (16, 512), 1, False),
    ("int4", 0, torch.bfloat16, Config(2, 1, 2, 2, 1), (48, 512), 5, True),
]


@pytest.mark.parametrize(("kind", "group", "dtype", "config", "shape", "tokens", "bias"), CASES, ids=str)
def test_the_kernel_computes_the_product(emulated, kind, group, dtype, config, shape, tokens, bias):
    weight, keep = sparse(shape, torch.float8_e4m3fn if kind == "float8" else dtype)
    exact = weight.double()
    if kind.startswith("int"):
        weight = quantize_absmax(weight, keep, int(kind[3:]), group or shape[1])
        exact = weight.dequantize(torch.float32).double()
    packed = SparseMma().pack(weight, keep)
    x = torch.randn(tokens, shape[1]).to(dtype)
    offset = torch.randn(shape[0]).to(dtype) if bias else None
    scales = packed["scales"].view(torch.float32) if "scales" in packed else None
    out = torch.full((tokens, shape[0]), float("nan"), dtype=dtype)
    sparse_mma.compute(x, packed["fragments"].view(torch.int32), scales, offset, out, config)
    expected = functional.linear(x.double(), exact, None if offset is None else offset.double())
    dense_error = (functional.linear(x, exact.to(dtype), offset) - expected).abs().max()
    assert (out - expected).abs().max() <= 1.1 * dense_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_float8_is_exact(emulated, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(1.0)
    keep = PATTERN.keep(torch.rand(16, 256))
    weight = every.expand(16, -1).masked_fill(~keep, 0).to(torch.float8_e4m3fn)
    packed, x = SparseMma().pack(weight, keep), torch.eye(256, dtype=dtype)
    out = torch.empty(256, 16, dtype=dtype)
    sparse_mma.compute(x, packed["fragments"], None, None, out, Config(1, 2, 1, 1, 0))
    assert torch.equal(out, weight.to(dtype).T)


@pytest.mark.parametrize(
    ("kind", "group", "dtype"),
    [
        ("16", 0, torch.bfloat16),
        ("float8", 0, torch.float16),
        ("int8", 0, torch.bfloat16),
        ("int8", 32, torch.float16),
        ("int4", 128, torch.bfloat16),
    ],
    ids=str,
)
def test_expanding_gives_the_weight(emulated, kind, group, dtype):
    weight, keep = sparse((32, 608), torch.float8_e4m3fn if kind == "float8" else dtype)
    if kind.startswith("int"):
        weight = quantize_absmax(weight, keep, int(kind[3:]), group or 608)
    packed = SparseMma().pack(weight, keep)
    scales = packed["scales"].view(torch.float32) if "scales" in packed else None
    got = sparse_mma.expand(packed["fragments"].view(torch.int32), scales, dtype, 608)
    expected = weight.dequantize(torch.float32) if scales is not None else weight
    assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 16, 300])
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 4096), (64, 256)], ids=str)
def test_candidates_fit_into_shared_memory(shape, tokens):
    limit, tiles = 227 << 10, shape[1] // 256
    default = default_config(shape[0], tiles, tokens, 132, limit)
    for config in [default, *candidates(default, tiles, tokens, limit)]:
        staged = config.staged * staged_bytes(tiles, tokens, config.token_tiles)
        assert staged + config.warps * config.row_tiles * config.token_tiles * 512 <= limit
        assert config.warps <= tiles


def test_not_a_number_stays_in_its_token(emulated):
    weight, keep = sparse((16, 256), torch.bfloat16)
    packed, x = SparseMma().pack(weight, keep), torch.randn(3, 256).bfloat16()
    x[1, 5] = float("nan")
    out = torch.empty(3, 16, dtype=torch.bfloat16)
    sparse_mma.compute(x, packed["fragments"].view(torch.int32), None, None, out, Config(1, 1, 1, 1, 0))
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()
