/* The bf16 2:4 layout: packing, unpacking, and how inputs are laid out for it. */
#include "kernel.h"

enum { COLUMNS = 32, GROUPS = 8, WORDS = BLOCK_ROWS * (1 + GROUPS) };

/* x as float32, [block][group][token][4]: a token's four inputs of a group are read as one. */
static void prepare(void *prepared, const void *x, int type, int64_t columns, int tokens) {
    float *to = prepared;
    int64_t padded = (columns + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (int64_t column = 0; column < padded; column += 4)
        for (int t = 0; t < tokens; t++, to += 4) {
            int64_t at = t * columns + column;
            if (column >= columns) memset(to, 0, 4 * sizeof *to);
            else if (type == FLOAT32) memcpy(to, (const float *)x + at, 4 * sizeof *to);
            else
                for (int i = 0; i < 4; i++) to[i] = from_bfloat16(((const uint16_t *)x)[at + i]);
        }
}

const struct format bf16_format = {COLUMNS, WORDS * 4, COLUMNS * 4, 512, prepare};

/* Pair code of a group by the bits of what it keeps. A single kept value comes first or second, as its pair has it. */
static const uint8_t CODES[16] = {[0] = 0x4, [1] = 0x4, [2] = 0x4, [3] = 0x4, [4] = 0x8, [5] = 0x8,
                                  [6] = 0x9, [8] = 0x3, [9] = 0x3, [10] = 0xD, [12] = 0xE};

/* Pack a weight (rows, columns) of which keep, one byte a weight, chooses at most two in four; columns is a multiple
 * of 4. Returns the number of groups that keep more, in which case blocks are not valid. */
int64_t bf16_pack(uint32_t *blocks, const uint16_t *weight, const uint8_t *keep, int64_t rows, int64_t columns) {
    int64_t column_blocks = (columns + COLUMNS - 1) / COLUMNS, wrong = 0;
#pragma omp parallel for reduction(+ : wrong)
    for (int64_t first = 0; first < rows; first += BLOCK_ROWS) {
        uint32_t *block = blocks + first / BLOCK_ROWS * column_blocks * WORDS;
        memset(block, 0, column_blocks * WORDS * sizeof *block);
        for (int r = 0; r < BLOCK_ROWS && first + r < rows; r++)
            for (int64_t column = 0; column < columns; column += 4) {
                int64_t at = (first + r) * columns + column, group = column % COLUMNS / 4;
                uint32_t *to = block + column / COLUMNS * WORDS + r;
                int bits = 0;
                for (int i = 0; i < 4; i++) bits |= (keep[at + i] != 0) << i;
                uint32_t code = CODES[bits], one = code & 3, two = code >> 2;
                wrong += bits && !code;
                uint32_t low = bits >> one & 1 ? weight[at + one] : 0, high = bits >> two & 1 ? weight[at + two] : 0;
                to[0] |= code << 4 * group;
                to[BLOCK_ROWS * (1 + group)] = low | high << 16;
            }
    }
    return wrong;
}

/* The inverse of bf16_pack. */
void bf16_unpack(uint16_t *weight, const uint32_t *blocks, int64_t rows, int64_t columns) {
    int64_t column_blocks = (columns + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column += 4) {
            const uint32_t *block = blocks + (row / BLOCK_ROWS * column_blocks + column / COLUMNS) * WORDS;
            int64_t r = row % BLOCK_ROWS, group = column % COLUMNS / 4;
            uint32_t code = block[r] >> 4 * group, pair = block[BLOCK_ROWS * (1 + group) + r];
            uint16_t *to = weight + row * columns + column;
            memset(to, 0, 4 * sizeof *to);
            to[code & 3] = (uint16_t)pair;
            to[code >> 2 & 3] = (uint16_t)(pair >> 16);
        }
}
