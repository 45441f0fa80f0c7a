/* bf16 2:4, many tokens, on AMX: blocks are made dense in the L1 cache, in the form its matrix product reads. */
#include "kernel.h"

#include <immintrin.h>

enum { BLOCKS_HELD = 16, TILE_ROWS = 16 };

/* Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, 18.3: palette 1. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* One block as 16 pairs of columns by 16 rows. */
static void make_dense(uint32_t (*dense)[BLOCK_ROWS], const uint32_t *block) {
    for (int group = 0; group < 8; group++)
        for (int r = 0; r < BLOCK_ROWS; r++) {
            uint32_t code = block[r] >> 4 * group, pair = block[BLOCK_ROWS * (1 + group) + r];
            uint64_t first = (uint64_t)(pair & 0xFFFF) << 16 * (code & 3);
            uint64_t four = first | (uint64_t)(pair >> 16) << 16 * (code >> 2 & 3);
            dense[2 * group][r] = (uint32_t)four;
            dense[2 * group + 1][r] = (uint32_t)(four >> 32);
        }
}

/* Tiles 0 to 2 are sums of 16 tokens each and 3 their inputs; 4 and 5 the same of the last, fewer tokens; 6 weights. */
static void configure(int rest) {
    struct tile_config config = {.palette = 1};
    for (int tile = 0; tile < 7; tile++) {
        config.rows[tile] = (uint8_t)(tile == 4 || tile == 5 ? rest : TILE_ROWS);
        config.row_bytes[tile] = config.rows[tile] ? 64 : 0;
    }
    _tile_loadconfig(&config);
}

/* Add to the sums of tile number `sum` the products of inputs `x`, for each block. */
#define PRODUCT(sum, inputs, x) \
    _tile_loadd(inputs, (x), 64); \
    _tile_dpbf16ps(sum, inputs, 6)

static void sum_some(float *sums, int64_t stride, const uint16_t *x, uint32_t (*dense)[TILE_ROWS][BLOCK_ROWS],
                     int64_t count, int tokens) {
    int64_t bytes = stride * (int64_t)sizeof(float);
    int token = 0;
    for (; token + 3 * TILE_ROWS <= tokens; token += 3 * TILE_ROWS) { /* weights are read once for three */
        float *to = sums + token * stride;
        const uint16_t *at = x + token * 32;
        _tile_loadd(0, to, bytes);
        _tile_loadd(1, to + TILE_ROWS * stride, bytes);
        _tile_loadd(2, to + 2 * TILE_ROWS * stride, bytes);
        for (int64_t i = 0; i < count; i++, at += 32 * tokens) {
            _tile_loadd(6, dense[i], 64);
            PRODUCT(0, 3, at);
            PRODUCT(1, 3, at + TILE_ROWS * 32);
            PRODUCT(2, 3, at + 2 * TILE_ROWS * 32);
        }
        _tile_stored(0, to, bytes);
        _tile_stored(1, to + TILE_ROWS * stride, bytes);
        _tile_stored(2, to + 2 * TILE_ROWS * stride, bytes);
    }
    for (; token + TILE_ROWS <= tokens; token += TILE_ROWS) {
        const uint16_t *at = x + token * 32;
        _tile_loadd(0, sums + token * stride, bytes);
        for (int64_t i = 0; i < count; i++, at += 32 * tokens) {
            _tile_loadd(6, dense[i], 64);
            PRODUCT(0, 3, at);
        }
        _tile_stored(0, sums + token * stride, bytes);
    }
    if (token < tokens) {
        const uint16_t *at = x + token * 32;
        _tile_loadd(4, sums + token * stride, bytes);
        for (int64_t i = 0; i < count; i++, at += 32 * tokens) {
            _tile_loadd(6, dense[i], 64);
            PRODUCT(4, 5, at);
        }
        _tile_stored(4, sums + token * stride, bytes);
    }
}

void bf16wide_tile_amx(float *sums, int64_t stride, const void *x, const void *blocks, int64_t count, int tokens) {
    _Alignas(64) uint32_t dense[BLOCKS_HELD][TILE_ROWS][BLOCK_ROWS];
    const uint32_t *block = blocks;
    configure(tokens % TILE_ROWS);
    for (int64_t first = 0; first < count; first += BLOCKS_HELD) {
        int64_t some = count - first < BLOCKS_HELD ? count - first : BLOCKS_HELD;
        for (int64_t i = 0; i < some; i++) make_dense(dense[i], block + (first + i) * 9 * BLOCK_ROWS);
        sum_some(sums, stride, (const uint16_t *)x + first * 32 * tokens, dense, some, tokens);
    }
    _tile_release();
}
