/* Unstructured bf16: packing, unpacking, and how inputs are laid out for its kernels. */
#include "bitmask.h"

static void prepare(void *prepared, const void *x, int type, int64_t columns, int tokens) {
    float *to = prepared;
    int64_t padded = (columns + MASK_COLUMNS - 1) / MASK_COLUMNS * MASK_COLUMNS;
    for (int64_t column = 0; column < padded; column += INPUTS)
        for (int t = 0; t < tokens; t++, to += INPUTS) {
            int64_t at = t * columns + column, left = columns - column;
            int count = left < INPUTS ? (int)(left > 0 ? left : 0) : INPUTS;
            memset(to, 0, INPUTS * sizeof *to);
            if (type == FLOAT32) memcpy(to, (const float *)x + at, sizeof *to * count);
            else
                for (int i = 0; i < count; i++) to[i] = from_bfloat16(((const uint16_t *)x)[at + i]);
        }
}

const struct format bitmask_format = {MASK_COLUMNS, 0, MASK_COLUMNS * 4, MASK_COLUMNS, prepare};

/* Pack a weight (rows, columns) of which keep, one byte a weight, says what stays. The offsets in blocks are filled in,
 * the rest of it is zeros. */
void bitmask_pack(uint8_t *blocks, const uint16_t *weight, const uint8_t *keep, int64_t rows, int64_t columns) {
    int64_t column_blocks = (columns + MASK_COLUMNS - 1) / MASK_COLUMNS;
    const int64_t *offsets = (const int64_t *)blocks;
#pragma omp parallel for
    for (int64_t first = 0; first < rows; first += BLOCK_ROWS)
        for (int64_t block = 0; block < column_blocks; block++) {
            uint8_t *bits = blocks + offsets[first / BLOCK_ROWS * column_blocks + block], *to = bits + MASK_BYTES;
            for (int64_t row = first; row < rows && row < first + BLOCK_ROWS; row++, bits += MASK_ROW_BYTES)
                for (int64_t i = 0, column = block * MASK_COLUMNS; i < MASK_COLUMNS && column < columns; i++, column++) {
                    int64_t at = row * columns + column;
                    if (!keep[at]) continue;
                    bits[i / 8] |= (uint8_t)(1 << i % 8);
                    memcpy(to, weight + at, sizeof *weight);
                    to += sizeof *weight;
                }
        }
}

/* The inverse; weight is zeros at first. */
void bitmask_unpack(uint16_t *weight, const uint8_t *blocks, int64_t rows, int64_t columns) {
    int64_t column_blocks = (columns + MASK_COLUMNS - 1) / MASK_COLUMNS;
    const int64_t *offsets = (const int64_t *)blocks;
#pragma omp parallel for
    for (int64_t first = 0; first < rows; first += BLOCK_ROWS)
        for (int64_t block = 0; block < column_blocks; block++) {
            const uint8_t *bits = blocks + offsets[first / BLOCK_ROWS * column_blocks + block];
            const uint8_t *from = bits + MASK_BYTES;
            for (int64_t row = first; row < rows && row < first + BLOCK_ROWS; row++, bits += MASK_ROW_BYTES)
                for (int64_t i = 0, column = block * MASK_COLUMNS; i < MASK_COLUMNS && column < columns; i++, column++) {
                    if (!(bits[i / 8] >> i % 8 & 1)) continue;
                    memcpy(weight + row * columns + column, from, sizeof *weight);
                    from += sizeof *weight;
                }
        }
}
