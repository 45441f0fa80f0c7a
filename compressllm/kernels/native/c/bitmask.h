/* The layout of unstructured bf16: for each row a bit a column, then the kept values.
 *
 * The buffer starts with int64 offsets[row blocks][column blocks], in bytes, and one more: the end. A block, which
 * holds 16 rows x 256 columns, follows the one before without a gap:
 *   uint8 bits[16][32]     bit i, lowest first, of byte b of row r: column 8 b + i is kept
 *   uint16 values[]        the kept ones of row 0, of row 1, ...; where a row starts is known by counting
 * OVERREAD bytes after the last block may be read, but are not used.
 */
#ifndef COMPRESSLLM_BITMASK_H
#define COMPRESSLLM_BITMASK_H

#include "kernel.h"

enum { MASK_COLUMNS = 256, MASK_ROW_BYTES = MASK_COLUMNS / 8, MASK_BYTES = BLOCK_ROWS * MASK_ROW_BYTES };
enum { TILE_TOKENS = 8 }; /* given to a kernel at once, at most */
enum { INPUTS = 16 }; /* of a token that lie together: x is [16 columns][token][16] float32 */

/* How many columns a row of a block keeps. */
static inline int kept_of_row(const uint8_t *bits) {
    int kept = 0;
    for (int i = 0; i < MASK_ROW_BYTES; i += 8) {
        uint64_t word;
        memcpy(&word, bits + i, sizeof word);
        kept += __builtin_popcountll(word);
    }
    return kept;
}

/* Rows of blocks first .. last as float32, (last - first) * 16 rows of `column_blocks` * 256, zeros among them; the
 * bits of a value are the high half of its float's. SPREAD(to, block, stride) does one block and returns its end. */
#define EXPAND(isa, SPREAD)                                                                                       \
    void bitmask_expand_##isa(float *to, const uint8_t *blocks, int64_t first, int64_t last, int64_t column_blocks) { \
        int64_t stride = column_blocks * MASK_COLUMNS;                                                            \
        _Pragma("omp parallel for schedule(static)") for (int64_t block = first; block < last; block++) {         \
            const uint8_t *at = blocks + ((const int64_t *)blocks)[block * column_blocks];                        \
            for (int64_t i = 0; i < column_blocks; i++)                                                           \
                at = SPREAD(to + (block - first) * BLOCK_ROWS * stride + i * MASK_COLUMNS, at, stride);           \
        }                                                                                                         \
    }

#endif
