/* The bf16 2:4 layout again, for kernels that take many tokens at once and multiply bf16 by bf16. */
#include "kernel.h"

/* x as bfloat16, [block][token][32]: of each block a matrix. Exact if x is bfloat16. */
static void prepare(void *prepared, const void *x, int type, int64_t columns, int tokens) {
    uint16_t *to = prepared;
    for (int64_t column = 0; column < columns; column += 32)
        for (int t = 0; t < tokens; t++, to += 32) {
            int64_t at = t * columns + column, count = columns - column < 32 ? columns - column : 32;
            memset(to, 0, 32 * sizeof *to);
            if (type == BFLOAT16) memcpy(to, (const uint16_t *)x + at, (size_t)count * sizeof *to);
            else
                for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16(((const float *)x)[at + i]);
        }
}

const struct format bf16wide_format = {32, 9 * BLOCK_ROWS * 4, 64, 512, 128, prepare};
