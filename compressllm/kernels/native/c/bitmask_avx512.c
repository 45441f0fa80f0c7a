/* Unstructured bf16 on AVX-512: 16 columns a vector. */
#include <immintrin.h>
#include <stdint.h>

#define LANES 16
#define ROWS(tokens) ((tokens) <= 2 ? 4 : (tokens) <= 4 ? 2 : 1)
typedef __m512 vec;
#define zero _mm512_setzero_ps
#define load _mm512_loadu_ps
#define fma _mm512_fmadd_ps
#define total _mm512_reduce_add_ps

static inline __attribute__((always_inline)) __m512 expand(const uint8_t *values, unsigned bits) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_maskz_expand_epi32((__mmask16)bits, wide), 16));
}
#include "bitmask_tile.h"

void bitmask_tile_avx512(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    tile_any(sums, stride, x, blocks, count, tokens);
}
