/* The product of wide formats on AMX. The including file defines
 *   expand(tile_words *to, const char *blocks, int64_t count, const char *next)
 *          `count` blocks of a row block as dense tiles; next: what to have in a cache by the next call, or NULL
 * and then WIDE_KERNEL(format, expand). */
#include "wide.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, 18.3: palette 1. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static const struct tile_config FULL_TILES = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
};

/* The compiler does not know that tile loads read memory: what was written before is to be there. */
#define WRITTEN() __asm__ volatile("" ::: "memory")
enum { TILE_WORDS = TILE * BLOCK_ROWS, TILE_INPUTS = TILE * TILE_COLUMNS };

/* What is to come into a cache, a few lines at a time: more at once than can be on their way would hold up the rest. */
struct ahead {
    const char *at[2];
    int64_t lines; /* a step, of each */
};

INLINE void fetch(struct ahead *ahead) {
    for (int64_t line = 0; line < ahead->lines; line++, ahead->at[0] += 64, ahead->at[1] += 64) {
        __builtin_prefetch(ahead->at[0], 0, 2);
        __builtin_prefetch(ahead->at[1], 0, 2);
    }
}

/* Add to the sums of one or two token tiles, by two row blocks, their products over `steps` column tiles. Each tile
 * loaded is multiplied by two. */
INLINE void multiply(float *sums, const uint16_t *x, const tile_words *dense, int64_t steps, const int two, int first,
                     struct ahead *ahead) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE_WORDS, 64);
        if (two) {
            _tile_loadd(2, sums + 2 * TILE_WORDS, 64);
            _tile_loadd(3, sums + 3 * TILE_WORDS, 64);
        }
    }
    for (int64_t i = 0; i < steps; i++, x += TILE_INPUTS) {
        fetch(ahead);
        _tile_loadd(4, x, 64);
        _tile_loadd(6, dense[i], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, dense[PANEL_TILES + i], 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, x + steps * TILE_INPUTS, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_WORDS, 64);
    if (two) {
        _tile_stored(2, sums + 2 * TILE_WORDS, 64);
        _tile_stored(3, sums + 3 * TILE_WORDS, 64);
    }
}

/* Store the sums of one token tile, plus the bias, into y. */
INLINE void finish(const struct panel *panel, const float *sums, int64_t token) {
    uint32_t mask = panel->rows < 32 ? (1u << panel->rows) - 1 : 0xFFFFFFFF;
    __mmask16 one = (__mmask16)mask, two = (__mmask16)(mask >> 16);
    int64_t tokens = least(TILE, panel->tokens - token);
    if (panel->type == FLOAT32) {
        const float *bias = panel->bias;
        __m512 first = bias ? _mm512_maskz_loadu_ps(one, bias) : _mm512_setzero_ps();
        __m512 second = bias ? _mm512_maskz_loadu_ps(two, bias + 16) : _mm512_setzero_ps();
        float *to = (float *)panel->y + token * panel->y_stride;
        for (int64_t t = 0; t < tokens; t++, to += panel->y_stride, sums += BLOCK_ROWS) {
            _mm512_mask_storeu_ps(to, one, _mm512_add_ps(_mm512_load_ps(sums), first));
            _mm512_mask_storeu_ps(to + 16, two, _mm512_add_ps(_mm512_load_ps(sums + TILE_WORDS), second));
        }
        return;
    }
    __m512i bias = panel->bias ? _mm512_maskz_loadu_epi16(mask, panel->bias) : _mm512_setzero_si512();
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bias));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bias, 1));
    __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    __m512 second = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
    uint16_t *to = (uint16_t *)panel->y + token * panel->y_stride;
    for (int64_t t = 0; t < tokens; t++, to += panel->y_stride, sums += BLOCK_ROWS)
        _mm512_mask_storeu_epi16(to, mask,
                                 (__m512i)_mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_load_ps(sums + TILE_WORDS), second),
                                                              _mm512_add_ps(_mm512_load_ps(sums), first)));
}

static void multiply_all(const struct panel *panel, const tile_words *dense) {
    const uint16_t *x = panel->x;
    float *sums = panel->sums;
    int64_t steps = panel->column_tiles, tile = 0;
    struct ahead ahead = {{panel->next[0], panel->next[1]}, 0};
    if (panel->token_tiles > FEW_TILES && panel->next[1]) /* of few tokens, what expands has them fetched */
        ahead.lines = panel->next_bytes / (64 * steps * (panel->token_tiles / 2)) + 1;
    if (panel->begin) _tile_loadconfig(&FULL_TILES);
    WRITTEN();
    for (; tile + 2 <= panel->token_tiles; tile += 2, x += 2 * steps * TILE_INPUTS, sums += 4 * TILE_WORDS) {
        multiply(sums, x, dense, steps, 1, panel->first, &ahead);
        if (!panel->last) continue;
        WRITTEN();
        finish(panel, sums, tile * TILE);
        finish(panel, sums + 2 * TILE_WORDS, tile * TILE + TILE);
    }
    if (tile < panel->token_tiles) {
        multiply(sums, x, dense, steps, 0, panel->first, &ahead);
        WRITTEN();
        if (panel->last) finish(panel, sums, tile * TILE);
    }
    if (panel->end) _tile_release();
}

#define WIDE_KERNEL(format, expand)                                                                            \
    void format##_tile_amx(const struct panel *panel) {                                                        \
        _Alignas(64) tile_words dense[2 * PANEL_TILES];                                                        \
        int few = panel->token_tiles <= FEW_TILES;                                                             \
        expand(dense, panel->blocks[0], panel->count, few ? panel->next[0] : NULL);                            \
        if (panel->blocks[1])                                                                                  \
            expand(dense + PANEL_TILES, panel->blocks[1], panel->count, few ? panel->next[1] : NULL);          \
        else memset(dense + PANEL_TILES, 0, sizeof *dense * (size_t)panel->column_tiles);                      \
        multiply_all(panel, dense);                                                                            \
    }
