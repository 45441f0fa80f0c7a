/* bf16 2:4 on NEON: 4 rows a vector. */
#include <arm_neon.h>

#define LANES 4
#define VECTORS(tokens) ((tokens) <= 4 ? 4 : 2)
typedef float32x4_t vec;
typedef uint32x4_t bits;
typedef uint8x16_t place, quad;
#define zero() vdupq_n_f32(0)
#define load vld1q_f32
#define store vst1q_f32
#define add vaddq_f32
#define fma(a, b, c) vfmaq_f32(c, a, b)
#define load_bits vld1q_u32
#define low(pair) vreinterpretq_f32_u32(vshlq_n_u32(pair, 16))
#define high(pair) vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xFFFF0000)))
#define four(from) vreinterpretq_u8_f32(vld1q_f32(from))
#define pick(x4, bytes) vreinterpretq_f32_u8(vqtbl1q_u8(x4, bytes))

/* tbl selects bytes: lane value p becomes the bytes 4 p .. 4 p + 3. */
static inline uint8x16_t position(uint32x4_t codes, int shift) {
    uint32x4_t two_bits = vandq_u32(vshlq_u32(codes, vdupq_n_s32(-shift)), vdupq_n_u32(3));
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), two_bits, 0x04040404));
}
#include "bf16_tile.h"

void bf16_tile_neon(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    tile_any(sums, stride, x, blocks, count, tokens);
}
