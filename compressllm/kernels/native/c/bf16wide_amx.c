/* bf16 2:4, many tokens, on AMX. */
#include "wide_amx.h"

#include "place_amx.h"

INLINE void expand(tile_words *to, const char *blocks, int64_t count, const char *next) {
    const uint32_t *block = (const uint32_t *)blocks;
    const struct place by = make_place();
    for (int64_t i = 0; i < count; i++, block += 9 * BLOCK_ROWS) {
        __m512i codes = _mm512_loadu_si512(block);
        if (next)
            for (int line = 0; line < 9; line++) __builtin_prefetch(next + (i * 9 + line) * 64, 0, 2);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++)
            place(to[i] + 2 * g, _mm512_loadu_si512(block + BLOCK_ROWS * (1 + g)), _mm512_srli_epi32(codes, 4 * g), &by);
    }
}

WIDE_KERNEL(bf16wide, expand)
