/* The layouts of quantised 2:4 weights, int8 and int4, with one scale for a row's G = 32, 64 or 128 columns.
 *
 * A block is 16 rows x G columns:
 *   uint16 scales[16]          of row r, float16
 *   then G / 32 times, for 32 columns each:
 *     uint32 positions[16]     of row r: byte s, bits 2 j, 2 j + 1 are a position in the group of four 2 j + s / 2
 *     int8:  uint32 codes[4][16]   [j][r]: byte s is the code at that position
 *     int4:  uint32 codes[2][16]   [j / 2][r]: of byte s the low half for an even j, the high half for an odd one
 *
 * In words: step j takes two groups of four, of which slots 0 and 1 are the kept values of the first and slots 2 and 3
 * those of the second. So one byte shuffle selects the inputs of 4 slots in every row, and its indices are two bits of
 * each byte of the positions. A group that keeps fewer than two values is filled up with code 0 at position 0.
 *
 * 5 + 16 / G bits a weight in int8, 3 + 16 / G in int4.
 *
 * Each layout has two kernels. `exact` multiplies float32 inputs. The other first rounds the inputs to int8, with one
 * scale for each token and 32 columns, and then computes exactly in integers up to that scale.
 */
#ifndef COMPRESSLLM_INTEGER_H
#define COMPRESSLLM_INTEGER_H

#include "kernel.h"

enum {
    TILE_TOKENS = 8, /* given to a kernel at once, at most */
    SPAN = 32, /* columns that share their positions, and a scale of the inputs */
    STEPS = 4,
    SCALES_BYTES = 2 * BLOCK_ROWS,
    POSITIONS_BYTES = 4 * BLOCK_ROWS,
    ROUNDED_BYTES = SPAN + 4, /* of a token's rounded inputs: [token][SPAN] int8, then [token] float32 */
};

#define SPAN_BYTES(bits) (POSITIONS_BYTES + SPAN / 2 * BLOCK_ROWS * (bits) / 8)

/* The kernels of one instruction set: a tile_fn for each layout, from FUNCTION(sums, stride, x, blocks, count, tokens,
 * bits, spans). */
/* Bits of a code, and columns that share a scale. */
#define EACH_LAYOUT(DO) DO(8, 32) DO(8, 64) DO(8, 128) DO(4, 32) DO(4, 64) DO(4, 128)

#define KERNEL(isa, bits, group, suffix, FUNCTION)                                                              \
    void int##bits##_g##group##suffix##_tile_##isa(float *sums, int64_t stride, const void *x, const void *blocks, \
                                                   int64_t count, int tokens) {                                 \
        FUNCTION(sums, stride, x, blocks, count, tokens, bits, group / SPAN);                                   \
    }
#define KERNELS(isa, ROUNDED, EXACT)                                                                \
    KERNEL(isa, 8, 32, , ROUNDED) KERNEL(isa, 8, 64, , ROUNDED) KERNEL(isa, 8, 128, , ROUNDED)      \
    KERNEL(isa, 4, 32, , ROUNDED) KERNEL(isa, 4, 64, , ROUNDED) KERNEL(isa, 4, 128, , ROUNDED)      \
    KERNEL(isa, 8, 32, _exact, EXACT) KERNEL(isa, 8, 64, _exact, EXACT) KERNEL(isa, 8, 128, _exact, EXACT) \
    KERNEL(isa, 4, 32, _exact, EXACT) KERNEL(isa, 4, 64, _exact, EXACT) KERNEL(isa, 4, 128, _exact, EXACT)

#endif
