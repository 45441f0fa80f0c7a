/* How the layouts of integer.h are read one weight at a time. */
#ifndef COMPRESSLLM_INTEGER_SCALAR_H
#define COMPRESSLLM_INTEGER_SCALAR_H

#include "integer.h"

static inline float from_float16(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? __builtin_nanf("") : bits >> 15 ? -__builtin_inff() : __builtin_inff();
    uint32_t power = (uint32_t)(exponent ? exponent : 1) + 127 - 15 - 10; /* of the lowest bit of the fraction */
    float value = (float)(exponent ? fraction | 1024 : fraction), scale;
    power <<= 23;
    memcpy(&scale, &power, sizeof scale);
    return bits >> 15 ? -value * scale : value * scale;
}

/* Of row r, step j and slot s: the code, and the column within the span. */
static inline int code_of(const uint8_t *span, int bits, int r, int j, int s) {
    const uint8_t *codes = span + POSITIONS_BYTES + 4 * r + s;
    if (bits == 8) return (int8_t)codes[4 * BLOCK_ROWS * j];
    int half = codes[4 * BLOCK_ROWS * (j / 2)] >> 4 * (j % 2) & 15;
    return half - (half & 8) * 2;
}

static inline int column_of(const uint8_t *span, int r, int j, int s) {
    return 4 * (2 * j + s / 2) + (span[4 * r + s] >> 2 * j & 3);
}

#endif
