/* bf16 2:4 on vectors. The including file defines, for its instruction set:
 *   LANES, vec (float lanes), bits (uint32 lanes), zero, load, load_bits, add, store
 *   fma            a * b + c
 *   low, high      the first and the second bf16 of each lane as float
 *   quad, four     four floats from memory, as `pick` takes them
 *   place          where in a quad each lane looks: `position(codes, shift)`, from two bits of the codes
 *   pick           of a quad, what each lane looks at
 *   VECTORS(t)     vectors of rows held at once for t tokens: as many as leave registers for the rest
 */
#include "kernel.h"

enum {
    BLOCKS_SUMMED = 8,    /* into one register; then they are added to the rest: rounding grows with the count */
    PREFETCH_BYTES = 4096 /* ahead of the weights being read */
};

/* Into the L2 cache: into the first, there would be room for fewer in flight. */
#define PREFETCH(address) __builtin_prefetch((const char *)(address) + PREFETCH_BYTES, 0, 2)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* Add to `sums` the products of `vectors` vectors of rows and `tokens` tokens over `count` blocks. Each sum is kept in
 * `chains` registers, as many as hide the latency of fma. */
INLINE void sum_blocks(float *sums, int64_t stride, const float *x, const uint32_t *block, int64_t count,
                       const int tokens, const int vectors, const int chains) {
    vec sum[8][BLOCK_ROWS / LANES][4];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++)
            UNROLL for (int c = 0; c < chains; c++) sum[t][v][c] = zero();
    for (int64_t i = 0; i < count; i++, block += 9 * BLOCK_ROWS, x += 32 * tokens) {
        bits codes[BLOCK_ROWS / LANES];
        UNROLL for (int v = 0; v < vectors; v++) codes[v] = load_bits(block + v * LANES);
        PREFETCH(block);
        UNROLL for (int g = 0; g < 8; g++) {
            const uint32_t *pairs = block + BLOCK_ROWS * (1 + g);
            PREFETCH(pairs);
            UNROLL for (int v = 0; v < vectors; v++) {
                bits pair = load_bits(pairs + v * LANES);
                vec first = low(pair), second = high(pair);
                place one = position(codes[v], 4 * g), two = position(codes[v], 4 * g + 2);
                UNROLL for (int t = 0; t < tokens; t++) {
                    quad x4 = four(x + 4 * (g * tokens + t));
                    vec *to = sum[t][v];
                    to[2 * g % chains] = fma(first, pick(x4, one), to[2 * g % chains]);
                    to[(2 * g + 1) % chains] = fma(second, pick(x4, two), to[(2 * g + 1) % chains]);
                }
            }
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) {
            float *to = sums + t * stride + v * LANES;
            vec total = sum[t][v][0];
            UNROLL for (int c = 1; c < chains; c++) total = add(total, sum[t][v][c]);
            store(to, add(load(to), total));
        }
}

INLINE void sum_tile(float *sums, int64_t stride, const float *x, const uint32_t *blocks, int64_t count,
                     const int tokens, const int vectors, const int chains) {
    for (int64_t first = 0, some = BLOCKS_SUMMED * chains; first < count; first += some)
        for (int row = 0; row < BLOCK_ROWS; row += vectors * LANES) /* from memory once, then from the L1 cache */
            sum_blocks(sums + row, stride, x + first * 32 * tokens, blocks + first * 9 * BLOCK_ROWS + row,
                       count - first < some ? count - first : some, tokens, vectors, chains);
}

/* The kernel itself: one copy of the above for each number of tokens. */
INLINE void tile_any(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
#define CASE(tokens, chains) \
    case tokens: sum_tile(sums, stride, x, blocks, count, tokens, VECTORS(tokens), chains); break
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
