/* bf16 2:4 on AVX-512: 16 rows a vector. */
#include <immintrin.h>

#define LANES 16
#define VECTORS(tokens) 1
typedef __m512 vec, quad;
typedef __m512i bits, place;
#define zero _mm512_setzero_ps
#define load _mm512_loadu_ps
#define store _mm512_storeu_ps
#define add _mm512_add_ps
#define fma _mm512_fmadd_ps
#define load_bits(from) _mm512_loadu_si512(from)
#define low(pair) _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))
#define high(pair) _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xFFFF0000)))
#define position(codes, shift) _mm512_srli_epi32(codes, shift) /* vpermilps reads the low two bits of a lane */
#define four(from) _mm512_broadcast_f32x4(_mm_loadu_ps(from))
#define pick _mm512_permutevar_ps
#include "bf16_tile.h"

void bf16_tile_avx512(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    tile_any(sums, stride, x, blocks, count, tokens);
}
