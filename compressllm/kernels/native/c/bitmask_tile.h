/* Unstructured bf16 on vectors. The including file defines, for its instruction set:
 *   LANES, vec (float lanes), zero, load, fma (a * b + c)
 *   total      the sum of a vector's lanes
 *   expand     LANES columns of a row as float, zeros among them, from its next kept values and its next LANES bits
 *   ROWS(t)    rows held at once for t tokens, which share the inputs they load
 */
#include "bitmask.h"

#define INLINE static inline __attribute__((always_inline))
#define PREFETCH_BYTES 2048 /* ahead of the values being read */

INLINE void tile_of(float *sums, int64_t stride, const float *x, const uint8_t *block, int64_t count, const int tokens,
                    const int rows) {
    for (int64_t i = 0; i < count; i++, x += MASK_COLUMNS * tokens) {
        const uint8_t *bits = block, *next = block + MASK_BYTES;
        for (int r = 0; r < BLOCK_ROWS; r += rows, bits += MASK_ROW_BYTES * rows) {
            const uint8_t *values[4];
            vec sum[4][TILE_TOKENS];
            for (int k = 0; k < rows; k++) {
                values[k] = next;
                next += 2 * kept_of_row(bits + MASK_ROW_BYTES * k);
                for (int t = 0; t < tokens; t++) sum[k][t] = zero();
            }
            for (const uint8_t *line = values[0]; line < next; line += 64) __builtin_prefetch(line + PREFETCH_BYTES);
            for (int column = 0; column < MASK_COLUMNS; column += LANES) {
                const float *inputs = x + column / INPUTS * INPUTS * tokens + column % INPUTS;
#pragma GCC unroll 4
                for (int k = 0; k < rows; k++) {
                    uint16_t both;
                    memcpy(&both, bits + MASK_ROW_BYTES * k + column / 16 * 2, sizeof both);
                    unsigned few = (unsigned)both >> column % 16 & ((1u << LANES) - 1);
                    vec weights = expand(values[k], few);
                    values[k] += 2 * __builtin_popcount(few);
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; t++) sum[k][t] = fma(weights, load(inputs + INPUTS * t), sum[k][t]);
                }
            }
            for (int k = 0; k < rows; k++)
                for (int t = 0; t < tokens; t++) sums[t * stride + r + k] += total(sum[k][t]);
        }
        block = next;
    }
}

/* The kernel itself: one copy of the above for each number of tokens. */
INLINE void tile_any(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
#define CASE(t) \
    case t: tile_of(sums, stride, x, blocks, count, t, ROWS(t)); break
    switch (tokens) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
    }
#undef CASE
}
