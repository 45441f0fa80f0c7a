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

#endif
