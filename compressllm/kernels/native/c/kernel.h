/* What every native kernel shares: the block layout, and how a kernel is found.
 *
 * Layout "row in lane". A weight (rows, columns) is cut into row blocks of 16 rows, and a row block into blocks of
 * `block_columns` columns; rows and columns are padded with zeros. The blocks of a row block lie one after the other,
 * and the row blocks too, so that a thread reads one sequential stream. Within a block a vector register holds the
 * same position of neighbouring rows: no sum across lanes is needed, and instead of spreading weights out to their
 * columns, the inputs are selected by the weights' positions.
 *
 *   bf16 2:4, 16 rows x 32 columns, 576 bytes:
 *     uint32 codes[16]       of row r: bits 4 g .. 4 g + 3 are the pair code of columns 4 g .. 4 g + 3, g = 0 .. 7
 *     uint32 pairs[8][16]    of group g and row r: the two kept values, the first in the low half
 *
 * A pair code holds the position of the first kept value in its low two bits and of the second in its high two. The
 * pair {0, 3} is stored as (3, 0), which makes the low three bits of the six codes differ: they alone can index a
 * table of eight pairs. A group that keeps fewer than two values is filled up with +0.0 at another position.
 *
 * Adding a kernel, of format F (a layout of blocks) for instruction set I:
 *   F.c      defines `const struct format F_format` and what its layout needs (packing), compiled for any machine
 *   F_I.c    defines `tile_fn F_tile_I`, compiled with the flags of I; F_scalar.c must exist and is the oracle that the
 *            others are compared with before their first use
 * wide.h says how many tokens are computed, by other kernels of the same blocks.
 * `native/isa.py` lists the instruction sets. A set without a kernel for F uses that of the next lower set.
 */
#ifndef COMPRESSLLM_KERNEL_H
#define COMPRESSLLM_KERNEL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK_ROWS = 16 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };        /* type of inputs, outputs and bias */

/* Add to sums[t * stride + r] the products of 16 rows and `tokens` (1 to tile_tokens) tokens over `count` blocks.
 * x: what the format's `prepare` made of the tokens; blocks: the first block of the row block to read. */
typedef void tile_fn(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens);

/* Lay out `tokens` rows of x, those of one tile, for the kernels: x_bytes * tokens for each block of columns, zero past
 * the last column. x: (tokens, columns) of `type`, contiguous. */
typedef void prepare_fn(void *prepared, const void *x, int type, int64_t columns, int tokens);

struct format;

/* y (tokens, rows) = x (tokens, columns) W^T + bias (rows) or NULL, all contiguous and of `type`. Sums are float32 and
 * rounded once. Returns 0, or 1 if there is no memory for the prepared inputs. */
typedef int linear_fn(const struct format *format, tile_fn *tile, void *y, const void *x, const void *bias,
                      const void *blocks, int64_t tokens, int64_t rows, int64_t columns, int type);
linear_fn linear;

/* columns_at_once, a multiple of block_columns: how many one call of a kernel sums, before they are added to what came
 * before. The inputs of many tokens for so many columns should fit into a cache.
 * block_bytes is 0 where blocks differ in size; their int64 offsets [row block][block of columns] are then what
 * `blocks` starts with. */
struct format {
    int64_t block_columns, block_bytes, x_bytes, columns_at_once;
    int64_t tile_tokens; /* the most tokens a kernel is given at once, up to 128 */
    prepare_fn *prepare;
    linear_fn *linear; /* of formats for many tokens, see wide.h; NULL for others */
};

int64_t threads(void); /* that torch is set to use */

/* Memory of the calling thread, 64-byte aligned, kept for its next call and freed when it ends; NULL if there is none
 * to be had. */
void *scratch_of_thread(size_t size);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t rounded = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}

#endif
