"""The same sources for instruction sets this machine lacks, compiled against an emulation of their intrinsics.

Runs if COMPRESSLLM_SIMDE names a folder that holds SIMDe (github.com/simd-everywhere/simde), a header-only library.
"""

import ctypes
import os
import subprocess
from dataclasses import replace

import pytest
import torch

from compressllm.core.protocols import BACKENDS
from compressllm.kernels.native import bf16
from compressllm.kernels.native import library as module
from compressllm.kernels.native.build import SOURCES, build
from compressllm.kernels.native.library import SAMPLES, Library, differs, library

SIMDE = os.environ.get("COMPRESSLLM_SIMDE")
pytestmark = pytest.mark.skipif(not SIMDE, reason="COMPRESSLLM_SIMDE names no copy of SIMDe")

#: What the sources include -> the emulation of it, and what it lacks.
HEADERS = {
    "immintrin.h": """
        #define SIMDE_ENABLE_NATIVE_ALIASES
        #include <simde/x86/avx512.h>
        #include <simde/x86/f16c.h>
        #include <simde/x86/fma.h>
        static inline __m512 permutevar(__m512 a, __m512i at) {
            float from[16], to[16]; int where[16];
            simde_mm512_storeu_ps(from, a); simde_mm512_storeu_si512(where, at);
            for (int i = 0; i < 16; i++) to[i] = from[i / 4 * 4 + (where[i] & 3)];
            return simde_mm512_loadu_ps(to);
        }
        #define _mm512_permutevar_ps permutevar
        static inline __m512 cvtph(__m256i a) {
            float to[16]; uint16_t from[16];
            simde_mm256_storeu_si256(from, a);
            for (int i = 0; i < 16; i++) to[i] = simde_float16_to_float32(simde_uint16_as_float16(from[i]));
            return simde_mm512_loadu_ps(to);
        }
        #define _mm512_cvtph_ps cvtph
    """,
    "arm_neon.h": """
        #define SIMDE_ENABLE_NATIVE_ALIASES
        #include <simde/arm/neon.h>
    """,
}


@pytest.fixture(scope="module", params=["avx2", "avx512", "avx512vnni", "neon"])
def emulated(request, tmp_path_factory) -> Library:
    folder = tmp_path_factory.mktemp(request.param)
    for name, text in HEADERS.items():
        (folder / name).write_text(text)
    isas = {"scalar", request.param}
    kernels = {path for path in SOURCES.glob("*.c") if path.stem.rpartition("_")[2] in isas or "_" not in path.stem}
    command = ["cc", "-std=gnu11", "-O1", "-fPIC", "-shared", f"-I{folder}", f"-I{SIMDE}", "-DSIMDE_NO_NATIVE"]
    subprocess.run([*command, *map(str, sorted(kernels)), "-lpthread", "-o", folder / "k.so"], check=True)
    c = ctypes.CDLL(str(folder / "k.so"))
    module._declare(c)
    return Library(replace(build(), openmp=None), c, ("scalar", request.param), {})


@pytest.mark.parametrize("format", BACKENDS.names() and sorted(SAMPLES))  # which importing the backends fills in
def test_computes_what_the_scalar_kernel_computes(emulated, format):
    isa = emulated.isas[-1]
    kernel, oracle = emulated._address(format, isa), emulated._address(format, "scalar")
    if kernel is None:
        pytest.skip(f"no {format} kernel is written for {isa}")
    assert kernel.isa == isa
    assert differs(emulated, kernel, oracle) is None


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 33])
def test_is_as_close_as_torch(emulated, awkward, tokens):
    if emulated._address("bf16", emulated.isas[-1]) is None:
        pytest.skip("bf16 runs on the next lower set")
    weight, keep = awkward(50, 1000)
    blocks = bf16.pack(weight, keep)
    x = torch.randn(tokens, 1000).bfloat16()
    exact = x.double() @ weight.double().T
    got = emulated.linear(emulated.kernel("bf16", emulated.isas[-1]), x, blocks, None, 50)
    assert (got - exact).abs().max() <= 2 * ((x @ weight.T) - exact).abs().max()


def test_native_and_emulated_agree(emulated, awkward):
    if emulated.isas[-1] not in library().isas or emulated._address("bf16", emulated.isas[-1]) is None:
        pytest.skip("not native here")
    weight, keep = awkward(50, 1000)
    x = torch.randn(3, 1000)
    results = [
        one.linear(one.kernel("bf16", emulated.isas[-1]), x, bf16.pack(weight, keep), None, 50)
        for one in (emulated, library())
    ]
    torch.testing.assert_close(*results)
