/* Products of a few tokens with all rows of a dense weight, each weight read once for all of them. The including file
 * defines
 *   LANES        floats of a vector of its instruction set
 *   FEW(name)    the name with the instruction set behind
 * A tile of 3 rows and 4 tokens keeps its 12 sums, 3 weights and an input in 16 registers; it is bound by arithmetic
 * where a tile of one token is bound by memory. */
#include "kernel.h"

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

#define INLINE static inline __attribute__((always_inline))
enum { ROWS = 3, TOKENS = 4, BAND = 48 }; /* BAND: rows of one task */

INLINE vec load(const void *weights, int64_t at, const int type) {
    if (type == FLOAT32) return *(const vec *)((const float *)weights + at);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)weights + at), words) << 16);
}

INLINE float one(const void *weights, int64_t at, const int type) {
    return type == FLOAT32 ? ((const float *)weights)[at] : from_bfloat16(((const uint16_t *)weights)[at]);
}

INLINE void tile(float *y, int64_t stride, const float *x, const void *weights, int64_t row, int64_t columns,
                 const int rows, const int tokens, const int type) {
    vec sums[ROWS][TOKENS] = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        vec w[ROWS];
#pragma GCC unroll 3
        for (int r = 0; r < rows; r++) w[r] = load(weights, (row + r) * columns + i, type);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            vec in = *(const vec *)(x + t * columns + i);
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) sums[r][t] += w[r] * in;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            float total = 0;
            for (int lane = 0; lane < LANES; lane++) total += sums[r][t][lane];
            for (int64_t j = i; j < columns; j++) total += one(weights, (row + r) * columns + j, type) * x[t * columns + j];
            y[t * stride + row + r] = total;
        }
}

INLINE void rows_of(float *y, int64_t stride, const float *x, const void *weights, int64_t row, int64_t columns,
                    const int rows, int64_t tokens, const int type) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) tile(y + t * stride, stride, x + t * columns, weights, row, columns, rows, 4, type);
    float *rest = y + t * stride;
    const float *in = x + t * columns;
    if (tokens - t == 3) tile(rest, stride, in, weights, row, columns, rows, 3, type);
    if (tokens - t == 2) tile(rest, stride, in, weights, row, columns, rows, 2, type);
    if (tokens - t == 1) tile(rest, stride, in, weights, row, columns, rows, 1, type);
}

INLINE void all_of(float *y, const float *x, const void *weights, int64_t rows, int64_t columns, int64_t tokens,
                   const int type) {
#pragma omp parallel for schedule(static) if (rows * columns > 1 << 15)
    for (int64_t first = 0; first < rows; first += BAND) {
        int64_t row = first, end = first + BAND < rows ? first + BAND : rows;
        for (; row + ROWS <= end; row += ROWS) rows_of(y, rows, x, weights, row, columns, ROWS, tokens, type);
        for (; row < end; row++) rows_of(y, rows, x, weights, row, columns, 1, tokens, type);
    }
}

/* y (tokens, rows) = x (tokens, columns) W^T, for weights (rows, columns). */
void FEW(few_tokens)(float *y, const float *x, const void *weights, int64_t rows, int64_t columns, int64_t tokens,
                     int type) {
    if (type == FLOAT32) all_of(y, x, weights, rows, columns, tokens, FLOAT32);
    else all_of(y, x, weights, rows, columns, tokens, BFLOAT16);
}
