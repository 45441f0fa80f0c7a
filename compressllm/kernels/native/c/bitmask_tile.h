/* Unstructured bf16 on vectors. The including file defines, for its instruction set:
 *   LANES, vec (float lanes), zero, load, store, fma (a * b + c)
 *   total      the sum of a vector's lanes
 *   expand     LANES columns of a row as float, zeros among them, from its next kept values and its next LANES bits
 *   ROWS(t)    rows held at once for t tokens, which share the inputs they load
 */
#include "bitmask.h"

#define INLINE static inline __attribute__((always_inline))
#define PREFETCH_BYTES 4096 /* ahead of the values being read */

/* LANES columns of a row, whose kept values are then passed. As few instructions as possible: they, not memory, are what
 * takes the time. */
INLINE vec next_of(const uint8_t **values, const uint8_t *bits, int64_t column) {
    unsigned few = 0;
    if (LANES < 8) few = bits[column / 8] >> column % 8 & ((1u << LANES) - 1);
    else memcpy(&few, bits + column / 8, (LANES + 7) / 8);
    vec weights = expand(*values, few);
    *values += sizeof(uint16_t) * (size_t)__builtin_popcount(few);
    return weights;
}

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
            for (int line = 0; line < rows * MASK_COLUMNS; line += 64) /* as if half is kept: a count would mispredict */
                __builtin_prefetch(next + PREFETCH_BYTES + line);
            const float *inputs = x;
            for (int64_t column = 0; column < MASK_COLUMNS; column += INPUTS, inputs += INPUTS * tokens)
#pragma GCC unroll 4
                for (int part = 0; part < INPUTS; part += LANES)
#pragma GCC unroll 4
                    for (int k = 0; k < rows; k++) {
                        vec weights = next_of(&values[k], bits + MASK_ROW_BYTES * k, column + part);
#pragma GCC unroll 8
                        for (int t = 0; t < tokens; t++)
                            sum[k][t] = fma(weights, load(inputs + INPUTS * t + part), sum[k][t]);
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

INLINE const uint8_t *spread(float *to, const uint8_t *bits, int64_t stride) {
    const uint8_t *values = bits + MASK_BYTES;
    for (int r = 0; r < BLOCK_ROWS; r++, bits += MASK_ROW_BYTES, to += stride)
        for (int column = 0; column < MASK_COLUMNS; column += LANES) store(to + column, next_of(&values, bits, column));
    return values;
}
