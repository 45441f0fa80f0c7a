/* Quantised 2:4 on NEON: 4 rows a vector. */
#include <arm_neon.h>

#define LANES 4
#define VECTORS(tokens) ((tokens) <= 4 ? 4 : 2)
typedef float32x4_t vec;
typedef int32x4_t ints;
typedef uint8x16_t place, quad;
#define zero() vdupq_n_f32(0)
#define load vld1q_f32
#define store vst1q_f32
#define add vaddq_f32
#define mul vmulq_f32
#define fma(a, b, c) vfmaq_f32(c, a, b)
#define set1 vdupq_n_f32
#define to_float vcvtq_f32_s32
#define load_half(from) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))
#define load_ints(from) vld1q_s32((const int32_t *)(from))
#define CODE_UNIT(bits) 1.0f
#define code_at(codes, at, bits) \
    to_float(vshlq_s32(vshlq_s32(codes, vdupq_n_s32(32 - (at) - (bits))), vdupq_n_s32((bits) - 32)))
#define four(from) vreinterpretq_u8_f32(vld1q_f32(from))
#define pick(x4, bytes) vreinterpretq_f32_u8(vqtbl1q_u8(x4, bytes))

/* tbl selects bytes: lane value p becomes the bytes 4 p .. 4 p + 3. */
static inline uint8x16_t position(int32x4_t positions, int shift) {
    uint32x4_t two_bits = vandq_u32(vshlq_u32(vreinterpretq_u32_s32(positions), vdupq_n_s32(-shift)), vdupq_n_u32(3));
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), two_bits, 0x04040404));
}

/* Byte indices into 8 inputs, and the codes. */
struct steps {
    uint8x16_t index[4];
    int8x16_t code[4];
};

static inline __attribute__((always_inline)) struct steps read_steps(const char *positions, const int bits) {
    const uint8x16_t second_group = vreinterpretq_u8_u32(vdupq_n_u32(0x04040000)); /* 4 bytes on, for slots 2 and 3 */
    const uint8x16_t at = vld1q_u8((const uint8_t *)positions);
    const char *codes = positions + 64;
    struct steps steps;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        uint8x16_t two_bits = vandq_u8(vshlq_u8(at, vdupq_n_s8((int8_t)(-2 * j))), vdupq_n_u8(3));
        steps.index[j] = vorrq_u8(two_bits, second_group);
        int8x16_t both = vld1q_s8((const int8_t *)codes + 64 * (bits == 8 ? j : j / 2));
        steps.code[j] = bits == 8 ? both : vshrq_n_s8(j % 2 ? both : vshlq_n_s8(both, 4), 4);
    }
    return steps;
}

/* Two products fit into 16 bits: 2 * 128 * 127. */
static inline __attribute__((always_inline)) int32x4_t dot(const struct steps *steps, const char *x, const int bits) {
    int32x4_t sum = vdupq_n_s32(0);
    (void)bits;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        int8x8_t eight = vld1_s8((const int8_t *)x + 8 * j);
        int8x16_t picked = vqtbl1q_s8(vcombine_s8(eight, eight), steps->index[j]);
        int16x8_t low = vmull_s8(vget_low_s8(steps->code[j]), vget_low_s8(picked));
        int16x8_t high = vmull_s8(vget_high_s8(steps->code[j]), vget_high_s8(picked));
        sum = vpadalq_s16(sum, vpaddq_s16(low, high));
    }
    return sum;
}
#include "integer_tile.h"

KERNELS(neon, rounded, exact)
