/* Unstructured bf16 without vector instructions: the floor, and what the others are compared with. */
#include "bitmask.h"

void bitmask_tile_scalar(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    const uint8_t *bits = blocks;
    const float *inputs = x;
    for (int64_t i = 0; i < count; i++, inputs += MASK_COLUMNS * tokens) {
        const uint8_t *values = bits + MASK_BYTES;
        for (int r = 0; r < BLOCK_ROWS; r++, bits += MASK_ROW_BYTES) {
            float sum[TILE_TOKENS] = {0};
            for (int column = 0; column < MASK_COLUMNS; column++) {
                if (!(bits[column / 8] >> column % 8 & 1)) continue;
                uint16_t value;
                memcpy(&value, values, sizeof value);
                values += sizeof value;
                const float *at = inputs + column / INPUTS * INPUTS * tokens + column % INPUTS;
                for (int t = 0; t < tokens; t++) sum[t] += from_bfloat16(value) * at[INPUTS * t];
            }
            for (int t = 0; t < tokens; t++) sums[t * stride + r] += sum[t];
        }
        bits = values;
    }
}
