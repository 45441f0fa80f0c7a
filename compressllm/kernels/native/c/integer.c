/* Quantised 2:4: packing, unpacking, and how inputs are laid out for its kernels. */
#include "integer.h"

/* Positions of the first and the second kept of four, by the bits of what is kept; one that is missing is 0. */
static const uint8_t FIRST[16] = {[2] = 1, [4] = 2, [6] = 1, [8] = 3, [10] = 1, [12] = 2};
static const uint8_t SECOND[16] = {[3] = 1, [5] = 2, [6] = 2, [9] = 3, [10] = 3, [12] = 3};

static int64_t block_bytes(int bits, int64_t group) { return SCALES_BYTES + group / SPAN * SPAN_BYTES(bits); }

/* Pack codes (rows, columns) of which keep, one byte a weight, chooses at most two in four; columns is a multiple of 4.
 * scales: float16 (rows, ceil(columns / group)). Returns the number of groups of four that keep more than two, in which
 * case blocks, which are zeros at first, are not valid. */
int64_t integer_pack(uint8_t *blocks, const int8_t *codes, const uint8_t *keep, const uint16_t *scales, int64_t rows,
                     int64_t columns, int bits, int64_t group) {
    int64_t groups = (columns + group - 1) / group, size = block_bytes(bits, group), wrong = 0;
#pragma omp parallel for reduction(+ : wrong)
    for (int64_t row = 0; row < rows; row++) {
        int64_t r = row % BLOCK_ROWS;
        uint8_t *first_block = blocks + row / BLOCK_ROWS * groups * size;
        for (int64_t g = 0; g < groups; g++)
            memcpy(first_block + g * size + 2 * r, scales + row * groups + g, sizeof *scales);
        for (int64_t column = 0; column < columns; column += 4) {
            const int8_t *from = codes + row * columns + column;
            const uint8_t *kept = keep + row * columns + column;
            int mask = 0;
            for (int i = 0; i < 4; i++) mask |= (kept[i] != 0) << i;
            int position[2] = {FIRST[mask], SECOND[mask]};
            wrong += __builtin_popcount((unsigned)mask) > 2;
            uint8_t *span = first_block + column / group * size + SCALES_BYTES + column % group / SPAN * SPAN_BYTES(bits);
            int64_t j = column % SPAN / 8, slot = 4 * r + column % 8 / 2;
            for (int i = 0; i < 2; i++) {
                if (i >= __builtin_popcount((unsigned)mask)) continue; /* filled up with zeros */
                span[slot + i] |= (uint8_t)(position[i] << 2 * j);
                uint8_t *to = span + POSITIONS_BYTES + 4 * BLOCK_ROWS * (bits == 8 ? j : j / 2) + slot + i;
                *to |= bits == 8 ? (uint8_t)from[position[i]] : (uint8_t)((from[position[i]] & 15) << 4 * (j % 2));
            }
        }
    }
    return wrong;
}

/* The inverse: codes (rows, columns), which are zeros at first, and scales float16 (rows, ceil(columns / group)). */
void integer_unpack(int8_t *codes, uint16_t *scales, const uint8_t *blocks, int64_t rows, int64_t columns, int bits,
                    int64_t group) {
    int64_t groups = (columns + group - 1) / group, size = block_bytes(bits, group);
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        int64_t r = row % BLOCK_ROWS;
        const uint8_t *first_block = blocks + row / BLOCK_ROWS * groups * size;
        for (int64_t g = 0; g < groups; g++)
            memcpy(scales + row * groups + g, first_block + g * size + 2 * r, sizeof *scales);
        for (int64_t column = 0; column < columns; column += 4) {
            const uint8_t *span =
                first_block + column / group * size + SCALES_BYTES + column % group / SPAN * SPAN_BYTES(bits);
            int64_t j = column % SPAN / 8, slot = 4 * r + column % 8 / 2;
            for (int i = 0; i < 2; i++) {
                int position = span[slot + i] >> 2 * j & 3;
                uint8_t value = span[POSITIONS_BYTES + 4 * BLOCK_ROWS * (bits == 8 ? j : j / 2) + slot + i];
                int half = value >> 4 * (j % 2) & 15;
                codes[row * columns + column + position] |= (int8_t)(bits == 8 ? value : half - (half & 8) * 2);
            }
        }
    }
}

static float input(const void *x, int type, int64_t at) {
    return type == FLOAT32 ? ((const float *)x)[at] : from_bfloat16(((const uint16_t *)x)[at]);
}

/* One span of a token's inputs rounded to int8; what is not finite makes its scale, and so the sums over it, NaN. */
static void round_span(int8_t *rounded, float *scale, const float *values) {
    int32_t bits[SPAN], top = 0; /* without their sign, floats order as their bits do, NaN above all */
    memcpy(bits, values, sizeof bits);
    for (int i = 0; i < SPAN; i++) {
        int32_t magnitude = bits[i] & 0x7FFFFFFF;
        top = magnitude > top ? magnitude : top;
    }
    float largest;
    memcpy(&largest, &top, sizeof largest);
    *scale = top < 0x7F800000 ? largest / 127.0f : __builtin_nanf("");
    float inverse = *scale > 0.0f ? 127.0f / largest : 0.0f;
    if (!(inverse < __builtin_inff())) inverse = *scale = 0.0f; /* too small for a scale: rounded to zero */
    float shifted[SPAN];
    for (int i = 0; i < SPAN; i++) shifted[i] = values[i] * inverse + 12582912.0f; /* 1.5 * 2^23: steps of 1 */
    memcpy(bits, shifted, sizeof bits);
    for (int i = 0; i < SPAN; i++) rounded[i] = (int8_t)(bits[i] - 0x4B400000);
}

/* x rounded to int8: [span][token][32] int8 and [span][token] float32 scales. */
static void prepare_rounded(void *prepared, const void *x, int type, int64_t columns, int tokens, int64_t group) {
    int8_t *to = prepared;
    int64_t padded = (columns + group - 1) / group * group;
    for (int64_t column = 0; column < padded; column += SPAN, to += ROUNDED_BYTES * tokens)
        for (int t = 0; t < tokens; t++) {
            float values[SPAN] = {0};
            int64_t at = t * columns + column;
            int count = columns - column < SPAN ? (int)(columns > column ? columns - column : 0) : SPAN;
            if (type == FLOAT32) memcpy(values, (const float *)x + at, sizeof *values * count);
            else if (count == SPAN) /* a known number of turns, for the compiler */
                for (int i = 0; i < SPAN; i++) values[i] = from_bfloat16(((const uint16_t *)x)[at + i]);
            else
                for (int i = 0; i < count; i++) values[i] = from_bfloat16(((const uint16_t *)x)[at + i]);
            round_span(to + SPAN * t, (float *)(to + SPAN * tokens) + t, values);
        }
}

/* x as float32: [group of four][token][4]. */
static void prepare_exact(void *prepared, const void *x, int type, int64_t columns, int tokens, int64_t group) {
    float *to = prepared;
    int64_t padded = (columns + group - 1) / group * group;
    for (int64_t column = 0; column < padded; column += 4)
        for (int t = 0; t < tokens; t++, to += 4)
            for (int i = 0; i < 4; i++) to[i] = column < columns ? input(x, type, t * columns + column + i) : 0.0f;
}

enum { ROUNDED_COLUMNS = 1024, EXACT_COLUMNS = 256 }; /* at once: of 128 tokens, 147 and 128 KiB */

#define FORMAT(bits, group)                                                                                      \
    static void prepare_##bits##_##group(void *prepared, const void *x, int type, int64_t columns, int tokens) { \
        prepare_rounded(prepared, x, type, columns, tokens, group);                                              \
    }                                                                                                            \
    static void prepare_exact_##bits##_##group(void *prepared, const void *x, int type, int64_t columns,         \
                                               int tokens) {                                                     \
        prepare_exact(prepared, x, type, columns, tokens, group);                                                \
    }                                                                                                            \
    const struct format int##bits##_g##group##_format = {                                                        \
        group, SCALES_BYTES + group / SPAN * SPAN_BYTES(bits), group / SPAN * ROUNDED_BYTES, ROUNDED_COLUMNS, TILE_TOKENS,    \
        prepare_##bits##_##group};                                                                               \
    const struct format int##bits##_g##group##_exact_format = {                                                  \
        group, SCALES_BYTES + group / SPAN * SPAN_BYTES(bits), group * 4, EXACT_COLUMNS, TILE_TOKENS,                         \
        prepare_exact_##bits##_##group};

EACH_LAYOUT(FORMAT)
