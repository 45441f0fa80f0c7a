/* The product of wide formats without vector instructions: what the others are compared with. The including file
 * defines expand(tile_words *to, const char *blocks, int64_t count), and then WIDE_KERNEL(format, expand). */
#include "wide.h"

/* Add to the sums of one token tile and one row block their products over `steps` column tiles, each summed first:
 * rounding grows with the length of a sum. */
static void multiply(float (*sums)[BLOCK_ROWS], const uint16_t *x, const tile_words *dense, int64_t steps) {
    for (int64_t i = 0; i < steps; i++, x += TILE * TILE_COLUMNS)
        for (int t = 0; t < TILE; t++)
            for (int r = 0; r < BLOCK_ROWS; r++) {
                float part = 0;
                for (int pair = 0; pair < TILE; pair++) {
                    uint32_t two = dense[i][pair][r];
                    const uint16_t *inputs = x + t * TILE_COLUMNS + 2 * pair;
                    part += from_bfloat16((uint16_t)two) * from_bfloat16(inputs[0]);
                    part += from_bfloat16((uint16_t)(two >> 16)) * from_bfloat16(inputs[1]);
                }
                sums[t][r] += part;
            }
}

/* Store the sums of one token tile and one row block, plus the bias, into y from `row` on. */
static void finish(const struct panel *panel, float (*sums)[BLOCK_ROWS], int64_t token, int64_t row) {
    for (int64_t t = 0; t < TILE && token + t < panel->tokens; t++)
        for (int64_t r = 0; r < BLOCK_ROWS && row + r < panel->rows; r++) {
            int64_t at = (token + t) * panel->y_stride + row + r;
            if (panel->type == FLOAT32)
                ((float *)panel->y)[at] = sums[t][r] + (panel->bias ? ((const float *)panel->bias)[row + r] : 0.0f);
            else
                ((uint16_t *)panel->y)[at] = to_bfloat16(
                    sums[t][r] + (panel->bias ? from_bfloat16(((const uint16_t *)panel->bias)[row + r]) : 0.0f));
        }
}

static void multiply_all(const struct panel *panel, const tile_words *dense, int half) {
    for (int64_t tile = 0; tile < panel->token_tiles; tile++) {
        float(*sums)[BLOCK_ROWS] = (float(*)[BLOCK_ROWS])panel->sums + (2 * tile + half) * TILE;
        if (panel->first) memset(sums, 0, TILE * sizeof *sums);
        multiply(sums, panel->x + tile * panel->column_tiles * TILE * TILE_COLUMNS, dense, panel->column_tiles);
        if (panel->last) finish(panel, sums, tile * TILE, half * BLOCK_ROWS);
    }
}

#define WIDE_KERNEL(format, expand)                                       \
    void format##_tile_scalar(const struct panel *panel) {        \
        for (int half = 0; half < 2 && panel->blocks[half]; half++) { \
            tile_words dense[PANEL_TILES];                        \
            expand(dense, panel->blocks[half], panel->count);     \
            multiply_all(panel, dense, half);                     \
        }                                                         \
    }
