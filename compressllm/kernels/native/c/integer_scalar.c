/* Quantised 2:4 without vector instructions: the floor, and what the others are compared with. */
#include "integer_scalar.h"

static void rounded(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens, int bits,
                    int spans) {
    const uint8_t *at = blocks;
    const int8_t *inputs = x;
    for (int64_t i = 0; i < count; i++) {
        const uint16_t *scales = (const uint16_t *)at;
        float sum[TILE_TOKENS][BLOCK_ROWS] = {{0}};
        at += SCALES_BYTES;
        for (int span = 0; span < spans; span++, at += SPAN_BYTES(bits), inputs += ROUNDED_BYTES * tokens)
            for (int r = 0; r < BLOCK_ROWS; r++)
                for (int t = 0; t < tokens; t++) {
                    int32_t dot = 0;
                    for (int j = 0; j < STEPS; j++)
                        for (int s = 0; s < 4; s++)
                            dot += code_of(at, bits, r, j, s) * inputs[SPAN * t + column_of(at, r, j, s)];
                    sum[t][r] += (float)dot * ((const float *)(inputs + SPAN * tokens))[t];
                }
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < BLOCK_ROWS; r++) sums[t * stride + r] += sum[t][r] * from_float16(scales[r]);
    }
}

static void exact(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens, int bits,
                  int spans) {
    const uint8_t *at = blocks;
    const float *inputs = x;
    for (int64_t i = 0; i < count; i++) {
        const uint16_t *scales = (const uint16_t *)at;
        float sum[TILE_TOKENS][BLOCK_ROWS] = {{0}};
        at += SCALES_BYTES;
        for (int span = 0; span < spans; span++, at += SPAN_BYTES(bits), inputs += SPAN * tokens)
            for (int r = 0; r < BLOCK_ROWS; r++)
                for (int j = 0; j < STEPS; j++)
                    for (int s = 0; s < 4; s++) {
                        int column = column_of(at, r, j, s);
                        const float *four = inputs + 4 * (column / 4 * tokens) + column % 4;
                        for (int t = 0; t < tokens; t++) sum[t][r] += (float)code_of(at, bits, r, j, s) * four[4 * t];
                    }
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < BLOCK_ROWS; r++) sums[t * stride + r] += sum[t][r] * from_float16(scales[r]);
    }
}

KERNELS(scalar, rounded, exact)
