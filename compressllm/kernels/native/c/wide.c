/* y = x W^T + b for many tokens, by the kernels of wide formats: rows are cut into pairs of row blocks, columns into
 * panels. */
#include "wide.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    TOKENS_AT_ONCE = 512, /* a panel of whose inputs, 512 KiB, stays in the L2 cache */
    PAIRS_AT_ONCE = 16,   /* pairs of row blocks that share it; their sums are 1 MiB then */
    FEW_TOKENS = 64,      /* whose inputs stay in a cache as they are: pairs are then read from end to end */
};

struct job {
    const struct format *format;
    panel_fn *panel;
    const char *blocks, *x, *bias;
    char *y;
    int64_t row_blocks, column_blocks, rows, tokens;
    int type;
};

static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* One token tile of x as bf16, [panel][token tile][column tile][16][32]. tokens: of the tile; columns: of x. */
static void prepare(char *to, const char *x, int type, int64_t columns, int64_t column_tiles, int64_t token_tiles,
                    int64_t tile, int64_t tokens) {
    for (int64_t first = 0; first < column_tiles; first += PANEL_TILES) {
        int64_t wide = least(PANEL_TILES, column_tiles - first);
        uint16_t *at = (uint16_t *)to + (first * token_tiles + tile * wide) * TILE * TILE_COLUMNS;
        for (int64_t i = first; i < first + wide; i++)
            for (int64_t t = 0; t < TILE; t++, at += TILE_COLUMNS) {
                int64_t column = i * TILE_COLUMNS, from = t * columns + column;
                int64_t count = least(TILE_COLUMNS, columns - column);
                if (t < tokens && count == TILE_COLUMNS && type == BFLOAT16) { /* a copy of known size */
                    memcpy(at, (const uint16_t *)x + from, TILE_COLUMNS * sizeof *at);
                    continue;
                }
                memset(at, 0, TILE_COLUMNS * sizeof *at);
                for (int64_t c = 0; t < tokens && c < count; c++)
                    at[c] = type == BFLOAT16 ? ((const uint16_t *)x)[from + c] : to_bfloat16(((const float *)x)[from + c]);
            }
    }
}

/* Where block `column` of a row block begins. */
static const char *block_at(const struct job *job, int64_t block, int64_t column) {
    if (block >= job->row_blocks) return NULL;
    int64_t at = block * job->column_blocks + column;
    return job->blocks + (job->format->block_bytes ? at * job->format->block_bytes : ((const int64_t *)job->blocks)[at]);
}

/* One panel of a pair. Every sum is made in the same order, whatever the task. */
static void run_panel(const struct job *job, const char *x, float *sums, int64_t pair, int64_t column, int64_t next_pair,
                      int64_t next_column) {
    int64_t tiles_of_block = job->format->block_columns / TILE_COLUMNS, token_tiles = up(job->tokens, TILE);
    int64_t first_row = pair * 2 * BLOCK_ROWS, size = job->type == FLOAT32 ? 4 : 2;
    int64_t count = least(PANEL_TILES / tiles_of_block, job->column_blocks - column);
    struct panel panel = {
        .blocks = {block_at(job, 2 * pair, column), block_at(job, 2 * pair + 1, column)},
        .next = {block_at(job, 2 * next_pair, next_column), block_at(job, 2 * next_pair + 1, next_column)},
        .count = count,
        .column_tiles = count * tiles_of_block,
        .x = (const uint16_t *)x + column * tiles_of_block * token_tiles * TILE * TILE_COLUMNS,
        .token_tiles = token_tiles,
        .sums = sums,
        .first = column == 0,
        .last = column + count == job->column_blocks,
        .y = job->y + first_row * size,
        .bias = job->bias ? job->bias + first_row * size : NULL,
        .y_stride = job->rows,
        .tokens = job->tokens,
        .rows = least(2 * BLOCK_ROWS, job->rows - first_row),
        .type = job->type,
    };
    job->panel(&panel);
}

/* Pairs first..last. With few tokens a pair is read from end to end; with many, the pairs share a panel of the inputs. */
static void run_task(const struct job *job, const char *x, float *sums, int64_t first, int64_t last) {
    int64_t step = PANEL_COLUMNS / job->format->block_columns, all = job->column_blocks;
    int64_t sums_of_pair = up(job->tokens, TILE) * 2 * TILE * BLOCK_ROWS;
    if (job->tokens <= FEW_TOKENS) {
        for (int64_t pair = first; pair < last; pair++)
            for (int64_t column = 0; column < all; column += step) {
                int end = column + step >= all;
                run_panel(job, x, sums, pair, column, pair + end, end ? 0 : column + step);
            }
        return;
    }
    for (int64_t column = 0; column < all; column += step)
        for (int64_t pair = first; pair < last; pair++) {
            int end = pair + 1 == last;
            run_panel(job, x, sums + (pair - first) * sums_of_pair, pair, column,
                      end ? first : pair + 1, end ? least(column + step, all - 1) : column);
        }
}

int wide_linear(const struct format *format, tile_fn *panel, void *y, const void *x, const void *bias,
                const void *blocks, int64_t tokens, int64_t rows, int64_t columns, int type) {
    int64_t column_blocks = up(columns, format->block_columns), row_blocks = up(rows, BLOCK_ROWS);
    int64_t column_tiles = column_blocks * format->block_columns / TILE_COLUMNS, pairs = up(row_blocks, 2);
    int64_t size = type == FLOAT32 ? 4 : 2, workers = least(threads(), pairs);
    int64_t most_tokens = up(least(tokens, TOKENS_AT_ONCE), TILE) * TILE;
    int64_t step = least(PAIRS_AT_ONCE, pairs / (workers * 4)); /* small tasks even out what others take of a core */
    step = step < 1 ? 1 : step;
    int64_t x_bytes = most_tokens * column_tiles * TILE_COLUMNS * 2;
    int64_t sums_size = most_tokens * 2 * BLOCK_ROWS * (most_tokens <= FEW_TOKENS ? 1 : step);
    char *prepared = scratch_of_thread((size_t)(x_bytes + workers * sums_size * 4));
    if (!prepared) return 1;
    float *sums = (float *)(prepared + x_bytes);
    for (int64_t start = 0; start < tokens; start += TOKENS_AT_ONCE) {
        const char *from = (const char *)x + start * columns * size;
        struct job job = {format,     (panel_fn *)(void (*)(void))panel, blocks, prepared, bias,
                          (char *)y + start * rows * size, row_blocks, column_blocks, rows,
                          least(TOKENS_AT_ONCE, tokens - start), type};
        int64_t token_tiles = up(job.tokens, TILE);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
        for (int64_t tile = 0; tile < token_tiles; tile++)
            prepare(prepared, from + tile * TILE * columns * size, type, columns, column_tiles, token_tiles, tile,
                    least(TILE, job.tokens - tile * TILE));
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers) if (workers > 1)
        for (int64_t pair = 0; pair < pairs; pair += step)
            run_task(&job, prepared, sums + thread_number() * sums_size, pair, least(pair + step, pairs));
    }
    return 0;
}
