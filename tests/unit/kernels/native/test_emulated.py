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

#: Instruction set -> a format it has a kernel for.
FORMATS = {"avx2": "bf16", "avx512": "bf16", "neon": "bf16", "amx": "bf16wide"}

#: What the sources include -> the emulation of it, and what it lacks.
HEADERS = {
    "immintrin.h": """
        #pragma once
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

        #include "kernel.h"
        static inline __m512i cvtne2ps(__m512 high, __m512 low) {
            float from[32]; uint16_t to[32];
            simde_mm512_storeu_ps(from, low); simde_mm512_storeu_ps(from + 16, high);
            for (int i = 0; i < 32; i++) to[i] = to_bfloat16(from[i]);
            return simde_mm512_loadu_si512(to);
        }
        #undef _mm512_cvtne2ps_pbh
        #define _mm512_cvtne2ps_pbh cvtne2ps
        static inline __m512i expand_words(uint32_t kept, __m512i a) {
            uint16_t from[32], to[32] = {0};
            simde_mm512_storeu_si512(from, a);
            for (int i = 0, next = 0; i < 32; i++) if (kept >> i & 1) to[i] = from[next++];
            return simde_mm512_loadu_si512(to);
        }
        #undef _mm512_maskz_expand_epi16
        #define _mm512_maskz_expand_epi16 expand_words
        static struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles;
        static uint8_t tile[8][16][64];
        static void _tile_loadconfig(const void *from) { memcpy(&tiles, from, 64); memset(tile, 0xFF, sizeof tile); }
        static void _tile_release(void) { memset(&tiles, 0, sizeof tiles); }
        static void _tile_zero(int n) { memset(tile[n], 0, sizeof tile[n]); }
        static void _tile_loadd(int n, const void *from, long stride) {
            for (int r = 0; r < tiles.rows[n]; r++) memcpy(tile[n][r], (const char *)from + r * stride, tiles.bytes[n]);
        }
        static void _tile_stored(int n, void *to, long stride) {
            for (int r = 0; r < tiles.rows[n]; r++) memcpy((char *)to + r * stride, tile[n][r], tiles.bytes[n]);
        }
        static void _tile_dpbf16ps(int c, int a, int b) { /* c[m][n] += a[m][2 k + i] * b[k][2 n + i] */
            for (int m = 0; m < tiles.rows[c]; m++)
                for (int k = 0; k < tiles.bytes[a] / 4; k++)
                    for (int n = 0; n < tiles.bytes[c] / 4; n++)
                        for (int i = 0; i < 2; i++) {
                            uint16_t p, q; float sum;
                            memcpy(&p, tile[a][m] + 4 * k + 2 * i, 2); memcpy(&q, tile[b][k] + 4 * n + 2 * i, 2);
                            memcpy(&sum, tile[c][m] + 4 * n, 4);
                            sum += from_bfloat16(p) * from_bfloat16(q);
                            memcpy(tile[c][m] + 4 * n, &sum, 4);
                        }
        }
    """,
    "arm_neon.h": """
        #define SIMDE_ENABLE_NATIVE_ALIASES
        #include <simde/arm/neon.h>
    """,
}


@pytest.fixture(scope="module", params=["avx2", "avx512", "avx512vnni", "neon", "amx"])
def emulated(request, tmp_path_factory) -> Library:
    folder = tmp_path_factory.mktemp(request.param)
    for name, text in HEADERS.items():
        (folder / name).write_text(text)
    isas = {"scalar", request.param}
    kernels = {path for path in SOURCES.glob("*.c") if path.stem.rpartition("_")[2] in isas or "_" not in path.stem}
    command = ["cc", "-std=gnu11", "-O1", "-fPIC", "-shared", f"-I{folder}", f"-I{SIMDE}", f"-I{SOURCES}"]
    subprocess.run(
        [*command, "-DSIMDE_NO_NATIVE", "-w", *map(str, sorted(kernels)), "-lpthread", "-o", folder / "k.so"],
        check=True,
    )
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


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 16, 33, 47, 48, 100, 131])
def test_is_as_close_as_torch(emulated, awkward, tokens):
    if emulated._address(FORMATS.get(emulated.isas[-1], ""), emulated.isas[-1]) is None:
        pytest.skip("bf16 runs on the next lower set")
    weight, keep = awkward(50, 1000)
    blocks = bf16.pack(weight, keep)
    x = torch.randn(tokens, 1000).bfloat16()
    exact = x.double() @ weight.double().T
    isa = emulated.isas[-1]
    got = emulated.linear(emulated.kernel(FORMATS[isa], isa), x, blocks, None, 50)
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
