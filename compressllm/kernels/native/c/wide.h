/* Products with many tokens: weights are made dense where the caches hold them, and multiplied as bf16 by bf16.
 *
 * A wide format has the blocks of another. Its kernel is a panel_fn, which takes two row blocks and up to PANEL_COLUMNS
 * columns. It expands their weights to bf16 once, into the form the product reads:
 *   uint32 dense[2][PANEL_TILES][16][16]   of a row block and 32 columns: 16 pairs of columns x 16 rows, the first
 *                                          column of a pair in the low half
 * and multiplies them by all tokens at hand, which lie as
 *   uint16 x[token tile][column tile][16 tokens][32 columns]
 * Sums are float32 [token tile][2][16 tokens][16 rows]. All tiles are full: what is past the last row, column or token
 * is zero, or not used.
 *
 * Adding one, of format F for instruction set I, in F_I.c: a function that expands, and the product of wide_I.h.
 */
#ifndef COMPRESSLLM_WIDE_H
#define COMPRESSLLM_WIDE_H

#include "kernel.h"

enum {
    TILE = 16,             /* rows, tokens, or pairs of columns */
    TILE_COLUMNS = 2 * TILE,
    PANEL_COLUMNS = 256,   /* of two row blocks, dense: 16 KiB, which stay in the L1 cache */
    PANEL_TILES = PANEL_COLUMNS / TILE_COLUMNS,
    FEW_TILES = 4,         /* of tokens: what comes from memory, not the product, is then what takes the time */
    FEW_COLUMNS = 128,     /* of a panel then: so much as can be on its way from memory at once */
};

typedef uint32_t tile_words[TILE][BLOCK_ROWS];

struct panel {
    const char *blocks[2]; /* where the panel begins in each of the two row blocks; the second may be NULL */
    const char *next[2];   /* where the next panel to be computed begins, or NULL: it should come into a cache meanwhile */
    int64_t next_bytes;    /* of each, about */
    int64_t count;         /* blocks of the format in each */
    int64_t column_tiles;  /* what they make */
    const uint16_t *x;
    int64_t token_tiles;
    float *sums;
    int begin, end;   /* the first, the last of many calls by one thread, between which the state of tiles stands */
    int first, last;  /* sums begin; sums end, and are to be rounded into y */
    void *y;          /* (tokens, y_stride) from this panel's first row on, of `type` */
    const void *bias; /* of this panel's rows, or NULL */
    int64_t y_stride, tokens, rows;
    int type;
};

typedef void panel_fn(const struct panel *panel);

linear_fn wide_linear; /* takes a panel_fn for its tile_fn */

#define WIDE_FORMAT(columns, bytes) \
    { .block_columns = columns, .block_bytes = bytes, .linear = wide_linear }

#endif
