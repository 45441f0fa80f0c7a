/* Products with some rows of a dense weight only, for neurons chosen at run time. The including file defines
 *   LANES           floats of a vector of its instruction set
 *   ACTIVE(name)    the name with the instruction set behind
 * Vectors are the compiler's own, so that one text serves all. Weights are float32 or bfloat16, all else float32. */
#include "kernel.h"

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

#define INLINE static inline __attribute__((always_inline))
enum { PIECE = 1024 }; /* outputs of one task of active_columns: their sums stay in the first cache */

INLINE vec load(const void *weights, int64_t at, const int type) {
    if (type == FLOAT32) return *(const vec *)((const float *)weights + at);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)weights + at), words) << 16);
}

INLINE float one(const void *weights, int64_t at, const int type) {
    return type == FLOAT32 ? ((const float *)weights)[at] : from_bfloat16(((const uint16_t *)weights)[at]);
}

INLINE float dot(const void *weights, int64_t row, const float *x, int64_t columns, const int type) {
    vec sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= columns; i += 4 * LANES)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            sum[k] += load(weights, row * columns + i + k * LANES, type) * *(const vec *)(x + i + k * LANES);
    vec lanes = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
    for (; i < columns; i++) total += one(weights, row * columns + i, type) * x[i];
    return total;
}

INLINE void rows_of(float *y, const float *x, const void *weights, const int32_t *index, int64_t active,
                    int64_t columns, int64_t tokens, const int type) {
#pragma omp parallel for schedule(static) if (active * columns > 1 << 15)
    for (int64_t i = 0; i < active; i++)
        for (int64_t t = 0; t < tokens; t++) y[t * active + i] = dot(weights, index[i], x + t * columns, columns, type);
}

/* y (tokens, active) = x (tokens, columns) W[index]^T, for weights (rows, columns). */
void ACTIVE(active_rows)(float *y, const float *x, const void *weights, const int32_t *index, int64_t active,
                         int64_t columns, int64_t tokens, int type) {
    if (type == FLOAT32) rows_of(y, x, weights, index, active, columns, tokens, FLOAT32);
    else rows_of(y, x, weights, index, active, columns, tokens, BFLOAT16);
}

/* to[0 .. count) += sum over i of by[i] * row i of weights, four rows at a time. */
INLINE void add_rows(float *to, const float *by, const void *weights, const int32_t *index, int64_t active,
                     int64_t columns, int64_t first, int64_t count, const int type) {
    int64_t i = 0;
    for (; i + 4 <= active; i += 4) {
        int64_t row[4], j = 0;
        for (int k = 0; k < 4; k++) row[k] = index[i + k] * columns + first;
        for (; j + LANES <= count; j += LANES) {
            vec sum = *(vec *)(to + j);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) sum += load(weights, row[k] + j, type) * by[i + k];
            *(vec *)(to + j) = sum;
        }
        for (; j < count; j++)
            for (int k = 0; k < 4; k++) to[j] += one(weights, row[k] + j, type) * by[i + k];
    }
    for (; i < active; i++)
        for (int64_t j = 0; j < count; j++) to[j] += one(weights, index[i] * columns + first + j, type) * by[i];
}

INLINE void columns_of(float *y, const float *x, const void *weights, const int32_t *index, int64_t active,
                       int64_t columns, int64_t tokens, const int type) {
#pragma omp parallel for schedule(static) if (active * columns > 1 << 15)
    for (int64_t first = 0; first < columns; first += PIECE) {
        int64_t count = columns - first < PIECE ? columns - first : PIECE;
        for (int64_t t = 0; t < tokens; t++)
            add_rows(y + t * columns + first, x + t * active, weights, index, active, columns, first, count, type);
    }
}

/* y (tokens, columns) += x (tokens, active) W[index], for weights (rows, columns). */
void ACTIVE(active_columns)(float *y, const float *x, const void *weights, const int32_t *index, int64_t active,
                            int64_t columns, int64_t tokens, int type) {
    if (type == FLOAT32) columns_of(y, x, weights, index, active, columns, tokens, FLOAT32);
    else columns_of(y, x, weights, index, active, columns, tokens, BFLOAT16);
}
