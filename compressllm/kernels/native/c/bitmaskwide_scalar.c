/* Unstructured bf16 made dense, without vector instructions. */
#include "bitmask.h"
#include "wide_scalar.h"

static void expand(tile_words *to, const char *blocks, int64_t count) {
    const uint8_t *bits = (const uint8_t *)blocks;
    memset(to, 0, sizeof *to * (size_t)(count * (MASK_COLUMNS / TILE_COLUMNS)));
    for (int64_t i = 0; i < count; i++, to += MASK_COLUMNS / TILE_COLUMNS) {
        const uint8_t *values = bits + MASK_BYTES;
        for (int r = 0; r < BLOCK_ROWS; r++, bits += MASK_ROW_BYTES)
            for (int column = 0; column < MASK_COLUMNS; column++) {
                if (!(bits[column / 8] >> column % 8 & 1)) continue;
                uint16_t value;
                memcpy(&value, values, sizeof value);
                values += sizeof value;
                to[column / TILE_COLUMNS][column % TILE_COLUMNS / 2][r] |= (uint32_t)value << 16 * (column % 2);
            }
        bits = values;
    }
}

WIDE_KERNEL(bitmaskwide, expand)
