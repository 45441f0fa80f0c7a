/* bf16 2:4 on vectors. The including file defines, for its instruction set:
 *   LANES, vec (float lanes), bits (uint32 lanes), load, add, store;
 *   low, high      the first and the second bf16 of each lane as float
 *   shift          each lane to the right
 *   position       what `pick` needs of the low two bits of each lane
 *   four, quad     four floats from memory, as `pick` takes them
 *   pick           of these four the one each lane's position says
 *   fma            a * b + c
 *   VECTORS(t)     vectors of rows held at once for t tokens: as many as leave registers for the rest
 */
#include "kernel.h"

#define INLINE static inline __attribute__((always_inline))
#define PREFETCH_BYTES 2048 /* ahead of the weights being read */

/* `chains` sums of each row and token are kept apart, as many as hide the latency of fma. */
INLINE void tile_of(float *sums, int64_t stride, const float *x, const uint32_t *blocks, int64_t count,
                    const int tokens, const int vectors, const int chains) {
    for (int part = 0; part < BLOCK_ROWS; part += vectors * LANES) {
        const uint32_t *block = blocks + part;
        const float *at = x;
        vec sum[TILE_TOKENS][BLOCK_ROWS / LANES][4];
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
#pragma GCC unroll 4
                for (int c = 0; c < chains; c++) sum[t][v][c] = zero();
        for (int64_t i = 0; i < count; i++, block += 9 * BLOCK_ROWS, at += 32 * tokens) {
            bits codes[BLOCK_ROWS / LANES];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) codes[v] = load_bits(block + v * LANES);
            if (part == 0) __builtin_prefetch((const char *)block + PREFETCH_BYTES);
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++) {
                const uint32_t *pairs = block + BLOCK_ROWS * (1 + g);
                if (part == 0) __builtin_prefetch((const char *)pairs + PREFETCH_BYTES);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    bits pair = load_bits(pairs + v * LANES);
                    vec first = low(pair), second = high(pair);
                    place one = position(codes[v], 4 * g), two = position(codes[v], 4 * g + 2);
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; t++) {
                        quad x4 = four(at + 4 * (g * tokens + t));
                        vec *to = sum[t][v];
                        to[2 * g % chains] = fma(first, pick(x4, one), to[2 * g % chains]);
                        to[(2 * g + 1) % chains] = fma(second, pick(x4, two), to[(2 * g + 1) % chains]);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                float *to = sums + t * stride + part + v * LANES;
                vec total = sum[t][v][0];
#pragma GCC unroll 4
                for (int c = 1; c < chains; c++) total = add(total, sum[t][v][c]);
                store(to, add(load(to), total));
            }
    }
}

/* The kernel itself: one copy of the above for each number of tokens. */
INLINE void tile_any(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
#define CASE(t, chains) \
    case t: tile_of(sums, stride, x, blocks, count, t, VECTORS(t), chains); break
    switch (tokens) {
        CASE(1, 4);
        CASE(2, 2);
        CASE(3, 1);
        CASE(4, 1);
        CASE(5, 1);
        CASE(6, 1);
        CASE(7, 1);
        CASE(8, 1);
    }
#undef CASE
}
