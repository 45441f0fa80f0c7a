/* Quantised 2:4 made dense, without vector instructions. */
#include "integer_scalar.h"
#include "wide_scalar.h"

static void expand_of(tile_words *to, const uint8_t *at, int64_t count, int bits, int spans) {
    memset(to, 0, sizeof *to * (size_t)(count * spans));
    for (int64_t i = 0; i < count; i++) {
        const uint16_t *scales = (const uint16_t *)at;
        at += SCALES_BYTES;
        for (int span = 0; span < spans; span++, to++, at += SPAN_BYTES(bits))
            for (int r = 0; r < BLOCK_ROWS; r++)
                for (int j = 0; j < STEPS; j++)
                    for (int s = 0; s < 4; s++) {
                        uint32_t value = to_bfloat16((float)code_of(at, bits, r, j, s) * from_float16(scales[r]));
                        int column = column_of(at, r, j, s);
                        (*to)[column / 2][r] |= value << 16 * (column % 2); /* what is missing is a zero */
                    }
    }
}

#define FORMAT(bits, group)                                                                 \
    static void expand_##bits##_##group(tile_words *to, const char *blocks, int64_t count) { \
        expand_of(to, (const uint8_t *)blocks, count, bits, group / SPAN);                  \
    }                                                                                       \
    WIDE_KERNEL(int##bits##_g##group##wide, expand_##bits##_##group)

EACH_LAYOUT(FORMAT)
