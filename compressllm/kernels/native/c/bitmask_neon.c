/* Unstructured bf16 on NEON: 4 columns a vector. */
#include <arm_neon.h>

#define LANES 4
#define ROWS(tokens) ((tokens) <= 2 ? 4 : (tokens) <= 4 ? 2 : 1)
typedef float32x4_t vec;
#define zero() vdupq_n_f32(0)
#define load vld1q_f32
#define fma(a, b, c) vfmaq_f32(c, a, b)
#define total vaddvq_f32

/* For each 4 bits and column, which bytes of the next values make its float: none, or 0, 0 and the k-th value. */
#define KEPT_BELOW(bits, i) ((uint32_t)__builtin_popcount((bits) & ((1 << (i)) - 1)))
#define COLUMN(bits, i) ((bits) >> (i)&1 ? 0x01008080 + 0x02020000 * KEPT_BELOW(bits, i) : 0x80808080)
#define HALF(b) {COLUMN(b, 0), COLUMN(b, 1), COLUMN(b, 2), COLUMN(b, 3)}
#define HALVES4(b) HALF(b), HALF(b + 1), HALF(b + 2), HALF(b + 3)
static const uint32_t SPREAD[16][4] = {HALVES4(0), HALVES4(4), HALVES4(8), HALVES4(12)};

static inline __attribute__((always_inline)) float32x4_t expand(const uint8_t *values, unsigned bits) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vld1q_u8(values), vreinterpretq_u8_u32(vld1q_u32(SPREAD[bits]))));
}
#include "bitmask_tile.h"

void bitmask_tile_neon(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    tile_any(sums, stride, x, blocks, count, tokens);
}
