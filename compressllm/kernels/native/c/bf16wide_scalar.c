/* bf16 2:4 made dense, without vector instructions. */
#include "wide_scalar.h"

static void expand(tile_words *to, const char *blocks, int64_t count) {
    const uint32_t *block = (const uint32_t *)blocks;
    for (int64_t i = 0; i < count; i++, block += 9 * BLOCK_ROWS)
        for (int group = 0; group < 8; group++)
            for (int r = 0; r < BLOCK_ROWS; r++) {
                uint32_t code = block[r] >> 4 * group, pair = block[BLOCK_ROWS * (1 + group) + r];
                uint64_t first = (uint64_t)(pair & 0xFFFF) << 16 * (code & 3);
                uint64_t four = first | (uint64_t)(pair >> 16) << 16 * (code >> 2 & 3);
                to[i][2 * group][r] = (uint32_t)four;
                to[i][2 * group + 1][r] = (uint32_t)(four >> 32);
            }
}

WIDE_KERNEL(bf16wide, expand)
