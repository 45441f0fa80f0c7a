/* Quantised 2:4 on AVX-512 with VNNI: 16 rows a vector. */
#include <immintrin.h>

#define LANES 16
#define VECTORS(tokens) 1
typedef __m512 vec, quad;
typedef __m512i ints, place;
#define zero _mm512_setzero_ps
#define load _mm512_loadu_ps
#define store _mm512_storeu_ps
#define add _mm512_add_ps
#define mul _mm512_mul_ps
#define fma _mm512_fmadd_ps
#define set1 _mm512_set1_ps
#define to_float _mm512_cvtepi32_ps
#define load_half(from) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from)))
#define load_ints(from) _mm512_loadu_si512(from)
#define position(positions, shift) _mm512_srli_epi32(positions, shift) /* vpermilps reads the low two bits of a lane */
#define four(from) _mm512_broadcast_f32x4(_mm_loadu_ps(from))
#define pick _mm512_permutevar_ps

/* Shifts, and conversions, run on one of two ports only; with shuffles in their stead the other has as much to do.
 * In int8 the code is made the highest byte of an integer, in int4 it is the index of its float. */
#define CODE_UNIT(bits) ((bits) == 8 ? 16777216.0f : 1.0f)
static inline __attribute__((always_inline)) __m512 code_at(__m512i codes, const int at, const int bits) {
    if (bits == 4) {
        const __m512 of_half = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        return _mm512_permutexvar_ps(at ? _mm512_srli_epi32(codes, at) : codes, of_half);
    }
    __m512i top = at == 0    ? _mm512_slli_epi32(codes, 24)
                  : at == 24 ? _mm512_and_si512(codes, _mm512_set1_epi32((int)0xFF000000))
                             : _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(_mm_setr_epi8(
                                   -1, -1, -1, at / 8, -1, -1, -1, 4 + at / 8, -1, -1, -1, 8 + at / 8, -1, -1, -1,
                                   12 + at / 8)));
    return _mm512_cvtepi32_ps(top);
}

/* Byte shuffle indices into 8 inputs; codes raised by 128 or 8, since vpdpbusd multiplies unsigned by signed bytes. */
struct steps {
    __m512i index[4], raised[4];
};

static inline __attribute__((always_inline)) struct steps read_steps(const char *positions, const int bits) {
    const __m512i two_bits = _mm512_set1_epi8(0x33), low_half = _mm512_set1_epi8(15);
    const __m512i second_group = _mm512_set1_epi32(0x44440000); /* its inputs are 4 bytes on, for slots 2 and 3 */
    const char *codes = positions + 64;
    struct steps steps;
    /* vpshufb reads bits 0 to 3 and bit 7, so the odd steps' positions above may stay as long as they leave bit 7 clear */
    __m512i even = load_ints(positions), odd = _mm512_srli_epi32(even, 2);
    steps.index[0] = _mm512_ternarylogic_epi32(even, two_bits, second_group, 0xEA); /* even & two_bits | second_group */
    steps.index[1] = _mm512_ternarylogic_epi32(odd, two_bits, second_group, 0xEA);
    steps.index[2] = _mm512_srli_epi32(steps.index[0], 4);
    steps.index[3] = _mm512_srli_epi32(steps.index[1], 4);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        if (bits == 8) {
            steps.raised[j] = _mm512_xor_si512(load_ints(codes + 64 * j), _mm512_set1_epi8((char)0x80));
        } else {
            __m512i both = load_ints(codes + 64 * (j / 2));
            __m512i half = j % 2 ? _mm512_srli_epi16(both, 4) : both;
            steps.raised[j] = _mm512_ternarylogic_epi32(half, low_half, _mm512_set1_epi8(8), 0x6A); /* half & 15 ^ 8 */
        }
    }
    return steps;
}

static inline __attribute__((always_inline)) __m512i dot(const struct steps *steps, const char *x, const int bits) {
    const __m512i raise = _mm512_set1_epi8((char)(bits == 8 ? 128 : 8));
    __m512i sum = _mm512_setzero_si512(), excess = sum;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        long long eight;
        __builtin_memcpy(&eight, x + 8 * j, sizeof eight);
        __m512i picked = _mm512_shuffle_epi8(_mm512_set1_epi64(eight), steps->index[j]);
        sum = _mm512_dpbusd_epi32(sum, steps->raised[j], picked);
        excess = _mm512_dpbusd_epi32(excess, raise, picked);
    }
    return _mm512_sub_epi32(sum, excess);
}
#include "integer_tile.h"

KERNELS(avx512vnni, rounded, exact)
