/* Quantised 2:4, many tokens, on AMX. */
#include "integer.h"
#include "wide_amx.h"

#include "place_amx.h"

/* A code c, or 16 c in int4, is the float 2^15 + 128 + c once its byte, with the sign flipped, lies below these bits. One
 * fma then makes c * scale of it, exactly: no product here has more than 24 bits. */
#define CODE_BITS 0x47000000
#define CODE_OFFSET 32896.0f /* 2^15 + 128 */

/* 16 codes in the second lowest byte of each lane, times their scales; minus is -CODE_OFFSET * scale. */
INLINE __m512 scaled(__m512i codes, __m512 scale, __m512 minus, const int bits) {
    const __m512i byte = _mm512_set1_epi32(bits == 8 ? 0xFF00 : 0xF000), flip = _mm512_set1_epi32(CODE_BITS | 0x8000);
    __m512i value = _mm512_ternarylogic_epi32(codes, byte, flip, 0x6A); /* codes & byte ^ flip */
    return _mm512_fmadd_ps(_mm512_castsi512_ps(value), scale, minus);
}

/* The first and the second values of 16 rows as pairs of bf16. */
INLINE __m512i paired(__m512 first, __m512 second) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

INLINE void expand_of(tile_words *to, const char *block, int64_t count, const char *next, const int bits,
                      const int spans) {
    const struct place by = make_place();
    const __m512i first = _mm512_set1_epi32(0x00030003);
    for (int64_t i = 0; i < count; i++) {
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
        if (bits == 4) scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 16)); /* exact: no float16 is that small */
        __m512 minus = _mm512_mul_ps(scale, _mm512_set1_ps(-CODE_OFFSET));
        block += SCALES_BYTES;
        for (int span = 0; span < spans; span++, to++, block += SPAN_BYTES(bits)) {
            __m512i positions = _mm512_loadu_si512(block);
            const char *codes = block + POSITIONS_BYTES;
            for (int line = 0; next && line < SPAN_BYTES(bits); line += 64, next += 64) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
            for (int j = 0; j < STEPS; j++) {
                __m512i four = _mm512_loadu_si512(codes + 64 * (bits == 8 ? j : j / 2));
                if (bits == 4 && j % 2 == 0) four = _mm512_slli_epi32(four, 4);
                __m512i one = paired(scaled(_mm512_slli_epi32(four, 8), scale, minus, bits), scaled(four, scale, minus, bits));
                __m512i two = paired(scaled(_mm512_srli_epi32(four, 8), scale, minus, bits),
                                     scaled(_mm512_srli_epi32(four, 16), scale, minus, bits));
                /* Bits 0 and 1 from slot 0 or 2, bits 2 and 3 from slot 1 or 3: of the first group, and 16 bits on. */
                __m512i where = _mm512_ternarylogic_epi32(first, _mm512_srli_epi32(positions, 2 * j),
                                                          _mm512_srli_epi32(positions, 2 * j + 6), 0xCA);
                place((*to) + 4 * j, one, where, &by);
                place((*to) + 4 * j + 2, two, _mm512_srli_epi32(where, 16), &by);
            }
        }
    }
}

#define FORMAT(bits, group)                                                                                           \
    INLINE void expand_##bits##_##group(tile_words *to, const char *blocks, int64_t count, const char *next) {        \
        expand_of(to, blocks, count, next, bits, group / SPAN);                                                       \
    }                                                                                                                 \
    WIDE_KERNEL(int##bits##_g##group##wide, expand_##bits##_##group)

EACH_LAYOUT(FORMAT)
