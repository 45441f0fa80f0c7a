/* bf16 2:4 on AVX2: 8 rows a vector. */
#include <immintrin.h>

#define LANES 8
#define VECTORS(tokens) ((tokens) <= 4 ? 2 : 1)
typedef __m256 vec, quad;
typedef __m256i bits, place;
#define zero _mm256_setzero_ps
#define load _mm256_loadu_ps
#define store _mm256_storeu_ps
#define add _mm256_add_ps
#define fma _mm256_fmadd_ps
#define load_bits(from) _mm256_loadu_si256((const __m256i *)(from))
#define low(pair) _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16))
#define high(pair) _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int)0xFFFF0000)))
#define position(codes, shift) _mm256_srli_epi32(codes, shift) /* vpermilps reads the low two bits of a lane */
#define four(from) _mm256_broadcast_ps((const __m128 *)(from))
#define pick _mm256_permutevar_ps
#include "bf16_tile.h"

void bf16_tile_avx2(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    tile_any(sums, stride, x, blocks, count, tokens);
}
