/* bf16 2:4 without vector instructions: the floor, and what the others are compared with. */
#include "kernel.h"

void bf16_tile_scalar(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    const uint32_t *block = blocks;
    const float *at = x;
    for (int64_t i = 0; i < count; i++, block += 9 * BLOCK_ROWS, at += 32 * tokens) {
        float part[TILE_TOKENS][BLOCK_ROWS] = {{0}}; /* of one block: rounding grows with the length of a sum */
        for (int group = 0; group < 8; group++)
            for (int r = 0; r < BLOCK_ROWS; r++) {
                uint32_t code = block[r] >> 4 * group, pair = block[BLOCK_ROWS * (1 + group) + r];
                float first = from_bfloat16((uint16_t)pair), second = from_bfloat16((uint16_t)(pair >> 16));
                for (int t = 0; t < tokens; t++) {
                    const float *four = at + 4 * (group * tokens + t);
                    part[t][r] += first * four[code & 3] + second * four[code >> 2 & 3];
                }
            }
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < BLOCK_ROWS; r++) sums[t * stride + r] += part[t][r];
    }
}
