/* Unstructured bf16, many tokens, on AMX. */
#include "bitmask.h"
#include "wide_amx.h"

#define UNROLL _Pragma("GCC unroll 16")

/* Store 16 rows of 16 words as columns. */
INLINE void transpose(uint32_t (*to)[BLOCK_ROWS], const __m512i *row) {
    __m512i two[16], four[16], half[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) /* four[i + k]: word k of each quarter, of rows i .. i + 3 */
        UNROLL for (int k = 0; k < 2; k++) {
            four[i + 2 * k] = _mm512_unpacklo_epi64(two[i + k], two[i + 2 + k]);
            four[i + 2 * k + 1] = _mm512_unpackhi_epi64(two[i + k], two[i + 2 + k]);
        }
    UNROLL for (int k = 0; k < 4; k++) { /* even and odd quarters of rows 0 .. 7 and 8 .. 15 */
        half[k] = _mm512_shuffle_i32x4(four[k], four[4 + k], 0x88);
        half[4 + k] = _mm512_shuffle_i32x4(four[k], four[4 + k], 0xDD);
        half[8 + k] = _mm512_shuffle_i32x4(four[8 + k], four[12 + k], 0x88);
        half[12 + k] = _mm512_shuffle_i32x4(four[8 + k], four[12 + k], 0xDD);
    }
    UNROLL for (int k = 0; k < 8; k++) { /* half[k]: quarters 0 and 2, or 1 and 3 */
        int quarter = k / 4, word = k % 4;
        _mm512_store_si512(to[4 * quarter + word], _mm512_shuffle_i32x4(half[k], half[8 + k], 0x88));
        _mm512_store_si512(to[4 * quarter + 8 + word], _mm512_shuffle_i32x4(half[k], half[8 + k], 0xDD));
    }
}

INLINE void expand(tile_words *to, const char *blocks, int64_t count, const char *next) {
    const uint8_t *bits = (const uint8_t *)blocks;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *values[BLOCK_ROWS], *end = bits + MASK_BYTES;
        for (int r = 0; r < BLOCK_ROWS; r++) {
            values[r] = end;
            end += sizeof(uint16_t) * (size_t)kept_of_row(bits + MASK_ROW_BYTES * r);
        }
        int64_t ahead = (end - bits) / (MASK_COLUMNS / TILE_COLUMNS); /* bytes a tile, if the next keeps as many */
        for (int tile = 0; tile < MASK_COLUMNS / TILE_COLUMNS; tile++, to++) {
            __m512i row[BLOCK_ROWS];
            for (int64_t line = 0; next && line <= ahead; line += 64) __builtin_prefetch(next + tile * ahead + line, 0, 2);
            UNROLL for (int r = 0; r < BLOCK_ROWS; r++) {
                uint32_t kept;
                memcpy(&kept, bits + MASK_ROW_BYTES * r + 4 * tile, sizeof kept);
                row[r] = _mm512_maskz_expand_epi16(kept, _mm512_loadu_si512(values[r]));
                values[r] += sizeof(uint16_t) * (size_t)__builtin_popcount(kept);
            }
            transpose(*to, row);
        }
        bits = end;
    }
}

WIDE_KERNEL(bitmaskwide, expand)
