/* Quantised 2:4 on vectors. The including file defines, for its instruction set:
 *   LANES, vec (float lanes), ints (int32 lanes), zero, load, store, add, mul, fma (a * b + c), set1
 *   to_float          int32 lanes as float
 *   load_half         LANES float16 numbers as float
 *   struct steps      what is made of the positions and codes of LANES rows and one span, for any number of tokens
 *   read_steps        makes it, from the first of these rows' positions
 *   dot               sum of code * input over a span, exact: int32 lanes, from 32 int8 inputs
 * and for float inputs
 *   load_ints         LANES int32
 *   code_at           the code of `bits` bits from bit `at` of each lane on, as a float times CODE_UNIT(bits)
 *   position, four, quad, pick, VECTORS    as in bf16_tile.h
 */
#include "integer.h"

#define INLINE static inline __attribute__((always_inline))
#define PARTS (BLOCK_ROWS / LANES)
#define PREFETCH_BYTES 4096 /* ahead of the weights being read */

INLINE void prefetch(const char *from, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + PREFETCH_BYTES + i);
}

INLINE void rounded_of(float *sums, int64_t stride, const char *x, const char *block, int64_t count, const int tokens,
                       const int bits, const int spans) {
    vec total[TILE_TOKENS][PARTS], sum[TILE_TOKENS][PARTS];
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < PARTS; p++) total[t][p] = zero();
    for (int64_t i = 0; i < count; i++) {
        const uint16_t *scales = (const uint16_t *)block;
        block += SCALES_BYTES;
        for (int t = 0; t < tokens; t++)
            for (int p = 0; p < PARTS; p++) sum[t][p] = zero();
        for (int span = 0; span < spans; span++, block += SPAN_BYTES(bits), x += ROUNDED_BYTES * tokens) {
            const float *x_scales = (const float *)(x + SPAN * tokens);
            prefetch(block, SPAN_BYTES(bits));
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                struct steps steps = read_steps(block + 4 * LANES * p, bits);
                for (int t = 0; t < tokens; t++)
                    sum[t][p] = fma(to_float(dot(&steps, x + SPAN * t, bits)), set1(x_scales[t]), sum[t][p]);
            }
        }
        for (int p = 0; p < PARTS; p++) {
            vec scale = load_half(scales + p * LANES);
            for (int t = 0; t < tokens; t++) total[t][p] = fma(sum[t][p], scale, total[t][p]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < PARTS; p++) {
            float *to = sums + t * stride + p * LANES;
            store(to, add(load(to), total[t][p]));
        }
}

/* Rows are taken `vectors` at a time: as many as their sums and tokens leave registers for. */
INLINE void exact_of(float *sums, int64_t stride, const float *inputs, const char *blocks, int64_t count,
                     const int tokens, const int bits, const int spans, const int vectors) {
    for (int part = 0; part < PARTS; part += vectors) {
        const float *x = inputs;
        const char *block = blocks;
        vec total[TILE_TOKENS][PARTS], sum[TILE_TOKENS][PARTS];
        for (int t = 0; t < tokens; t++)
            for (int p = part; p < part + vectors; p++) total[t][p] = zero();
        for (int64_t i = 0; i < count; i++) {
            const uint16_t *scales = (const uint16_t *)block;
            block += SCALES_BYTES;
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sum[t][v] = zero();
            for (int span = 0; span < spans; span++, block += SPAN_BYTES(bits), x += SPAN * tokens) {
                if (part == 0) prefetch(block, SPAN_BYTES(bits));
#pragma GCC unroll 4
                for (int j = 0; j < STEPS; j++)
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++) {
                        const char *at = block + 4 * LANES * (part + v);
                        ints positions = load_ints(at);
                        ints codes = load_ints(at + POSITIONS_BYTES + 4 * BLOCK_ROWS * (bits == 8 ? j : j / 2));
#pragma GCC unroll 4
                        for (int s = 0; s < 4; s++) {
                            vec code = code_at(codes, 8 * s + (bits == 8 ? 0 : 4 * (j % 2)), bits);
                            place where = position(positions, 8 * s + 2 * j);
#pragma GCC unroll 8
                            for (int t = 0; t < tokens; t++) {
                                quad x4 = four(x + 4 * ((2 * j + s / 2) * tokens + t));
                                sum[t][v] = fma(code, pick(x4, where), sum[t][v]);
                            }
                        }
                    }
            }
            for (int v = 0; v < vectors; v++) {
                vec scale = mul(load_half(scales + (part + v) * LANES), set1(1.0f / CODE_UNIT(bits)));
                for (int t = 0; t < tokens; t++) total[t][part + v] = fma(sum[t][v], scale, total[t][part + v]);
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int p = part; p < part + vectors; p++) {
                float *to = sums + t * stride + p * LANES;
                store(to, add(load(to), total[t][p]));
            }
    }
}

/* One copy for one token, whose sums stay in registers, and one for more. */
#define BY_TOKENS(bits)                                                       \
    if (tokens == 1) rounded_of(sums, stride, x, blocks, count, 1, bits, spans); \
    else rounded_of(sums, stride, x, blocks, count, tokens, bits, spans)

static void rounded(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens, int bits,
                    int spans) {
    if (bits == 8) {
        BY_TOKENS(8);
    } else {
        BY_TOKENS(4);
    }
}

#define CASE(t, bits) \
    case t: exact_of(sums, stride, x, blocks, count, t, bits, spans, VECTORS(t)); break
#define CASES(bits)    \
    switch (tokens) {  \
        CASE(1, bits); \
        CASE(2, bits); \
        CASE(3, bits); \
        CASE(4, bits); \
        CASE(5, bits); \
        CASE(6, bits); \
        CASE(7, bits); \
        CASE(8, bits); \
    }

static void exact(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens, int bits,
                  int spans) {
    if (bits == 8) {
        CASES(8)
    } else {
        CASES(4)
    }
}
