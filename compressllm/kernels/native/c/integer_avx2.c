/* Quantised 2:4 on AVX2: 8 rows a vector. */
#include <immintrin.h>

#define LANES 8
#define VECTORS(tokens) ((tokens) <= 4 ? 2 : 1)
typedef __m256 vec, quad;
typedef __m256i ints, place;
#define zero _mm256_setzero_ps
#define load _mm256_loadu_ps
#define store _mm256_storeu_ps
#define add _mm256_add_ps
#define mul _mm256_mul_ps
#define fma _mm256_fmadd_ps
#define set1 _mm256_set1_ps
#define to_float _mm256_cvtepi32_ps
#define load_half(from) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from)))
#define load_ints(from) _mm256_loadu_si256((const __m256i *)(from))
#define CODE_UNIT(bits) 1.0f
#define code_at(codes, at, bits) to_float(_mm256_srai_epi32(_mm256_slli_epi32(codes, 32 - (at) - (bits)), 32 - (bits)))
#define position(positions, shift) _mm256_srli_epi32(positions, shift) /* vpermilps reads the low two bits of a lane */
#define four(from) _mm256_broadcast_ps((const __m128 *)(from))
#define pick _mm256_permutevar_ps

/* Byte shuffle indices into 8 inputs; magnitudes of the codes; bytes with the codes' signs, 0 only where the code is. */
struct steps {
    __m256i index[4], size[4], sign[4];
};

static inline __attribute__((always_inline)) struct steps read_steps(const char *positions, const int bits) {
    const __m256i two_bits = _mm256_set1_epi8(0x33), low_half = _mm256_set1_epi8(15);
    const __m256i second_group = _mm256_set1_epi32(0x44440000); /* its inputs are 4 bytes on, for slots 2 and 3 */
    const char *codes = positions + 64;
    struct steps steps;
    /* vpshufb reads bits 0 to 3 and bit 7, so the odd steps' positions above may stay as long as they leave bit 7 clear */
    __m256i even = load_ints(positions), odd = _mm256_srli_epi32(even, 2);
    steps.index[0] = _mm256_or_si256(_mm256_and_si256(even, two_bits), second_group);
    steps.index[1] = _mm256_or_si256(_mm256_and_si256(odd, two_bits), second_group);
    steps.index[2] = _mm256_srli_epi32(steps.index[0], 4);
    steps.index[3] = _mm256_srli_epi32(steps.index[1], 4);
    if (bits == 8) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            steps.sign[j] = load_ints(codes + 64 * j);
            steps.size[j] = _mm256_abs_epi8(steps.sign[j]);
        }
    } else {
        const __m256i size_of_half = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m256i both = load_ints(codes + 64 * (j / 2));
            __m256i half = j % 2 ? _mm256_srli_epi16(both, 4) : both;
            steps.size[j] = _mm256_shuffle_epi8(size_of_half, _mm256_and_si256(half, low_half));
            steps.sign[j] = j % 2 ? both : _mm256_slli_epi16(both, 4); /* what is below the sign bits does not matter */
        }
    }
    return steps;
}

/* vpmaddubsw adds two products of a magnitude and an input in 16 bits: 2 * 128 * 127 fits, and in int4 four times that. */
static inline __attribute__((always_inline)) __m256i dot(const struct steps *steps, const char *x, const int bits) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        long long eight;
        __builtin_memcpy(&eight, x + 8 * j, sizeof eight);
        __m256i picked = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), steps->index[j]);
        __m256i pairs = _mm256_maddubs_epi16(steps->size[j], _mm256_sign_epi8(picked, steps->sign[j]));
        sum = bits == 8 ? _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones)) : _mm256_add_epi16(sum, pairs);
    }
    return bits == 8 ? sum : _mm256_madd_epi16(sum, ones);
}
#include "integer_tile.h"

KERNELS(avx2, rounded, exact)
