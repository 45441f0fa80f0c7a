/* Unstructured bf16 on AVX2: 8 columns a vector. */
#include <immintrin.h>
#include <stdint.h>

#define LANES 8
#define ROWS(tokens) ((tokens) == 1 ? 4 : (tokens) <= 4 ? 2 : 1)
typedef __m256 vec;
#define zero _mm256_setzero_ps
#define load _mm256_loadu_ps
#define fma _mm256_fmadd_ps

/* For each 8 bits and column, which bytes of the next values make its float: none, or 0, 0 and the k-th value. */
#define KEPT_BELOW(bits, i) ((uint32_t)__builtin_popcount((bits) & ((1 << (i)) - 1)))
#define COLUMN(bits, i) ((bits) >> (i)&1 ? 0x01008080 + 0x02020000 * KEPT_BELOW(bits, i) : 0x80808080)
#define BYTE(b)                                                                                            \
    {COLUMN(b, 0), COLUMN(b, 1), COLUMN(b, 2), COLUMN(b, 3), COLUMN(b, 4), COLUMN(b, 5), COLUMN(b, 6), COLUMN(b, 7)}
#define BYTES4(b) BYTE(b), BYTE(b + 1), BYTE(b + 2), BYTE(b + 3)
#define BYTES16(b) BYTES4(b), BYTES4(b + 4), BYTES4(b + 8), BYTES4(b + 12)
#define BYTES64(b) BYTES16(b), BYTES16(b + 16), BYTES16(b + 32), BYTES16(b + 48)
static const _Alignas(32) uint32_t SPREAD[256][8] = {BYTES64(0), BYTES64(64), BYTES64(128), BYTES64(192)};

static inline __attribute__((always_inline)) __m256 expand(const uint8_t *values, unsigned bits) {
    __m256i next = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(next, _mm256_load_si256((const __m256i *)SPREAD[bits])));
}

static inline __attribute__((always_inline)) float total(__m256 lanes) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#include "bitmask_tile.h"

void bitmask_tile_avx2(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    tile_any(sums, stride, x, blocks, count, tokens);
}
