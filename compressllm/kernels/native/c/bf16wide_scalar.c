/* bf16 2:4, many tokens, without vector instructions: what the others are compared with. */
#include "kernel.h"

void bf16wide_tile_scalar(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    const uint32_t *block = blocks;
    const uint16_t *at = x;
    for (int64_t i = 0; i < count; i++, block += 9 * BLOCK_ROWS, at += 32 * tokens)
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < BLOCK_ROWS; r++) {
                float part = 0;
                for (int group = 0; group < 8; group++) {
                    uint32_t code = block[r] >> 4 * group, pair = block[BLOCK_ROWS * (1 + group) + r];
                    const uint16_t *four = at + 32 * t + 4 * group;
                    part += from_bfloat16((uint16_t)pair) * from_bfloat16(four[code & 3]);
                    part += from_bfloat16((uint16_t)(pair >> 16)) * from_bfloat16(four[code >> 2 & 3]);
                }
                sums[t * stride + r] += part;
            }
}
