/* y = x W^T + b for many tokens, by the kernels of wide formats: rows are cut into pairs of row blocks, columns into
 * panels. */
#include "wide.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    TOKENS_AT_ONCE = 384, /* a panel of whose inputs, 192 KiB, stays in the L2 cache */
    PAIRS_AT_ONCE = 16,   /* pairs of row blocks that share it; their sums are 768 KiB then */
};

struct job {
    const struct format *format;
    panel_fn *panel;
    const char *blocks, *x, *bias;
    char *y;
    int64_t row_blocks, column_blocks, rows, tokens;
    int64_t step; /* blocks of a panel, at most */
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
static void prepare(char *to, const char *x, int type, int64_t columns, int64_t column_tiles, int64_t panel_tiles,
                    int64_t token_tiles, int64_t tile, int64_t tokens) {
    for (int64_t first = 0; first < column_tiles; first += panel_tiles) {
        int64_t wide = least(panel_tiles, column_tiles - first);
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

struct place {
    int64_t pair, column; /* of row blocks; in blocks */
};

/* Where a panel begins in the first or the second row block of its pair, or NULL. */
static const char *block_at(const struct job *job, struct place place, int half) {
    int64_t block = 2 * place.pair + half, at = block * job->column_blocks + place.column;
    if (block >= job->row_blocks || place.column >= job->column_blocks) return NULL;
    return job->blocks + (job->format->block_bytes ? at * job->format->block_bytes : ((const int64_t *)job->blocks)[at]);
}

/* One panel. Every sum is made in the same order, whatever the task. */
static void run_panel(const struct job *job, float *sums, struct place at, struct place next, int begin, int end) {
    const struct format *format = job->format;
    int64_t tiles = format->block_columns / TILE_COLUMNS, token_tiles = up(job->tokens, TILE);
    int64_t first_row = at.pair * 2 * BLOCK_ROWS, size = job->type == FLOAT32 ? 4 : 2;
    int64_t count = least(job->step, job->column_blocks - at.column);
    struct panel panel = {
        .blocks = {block_at(job, at, 0), block_at(job, at, 1)},
        .next = {block_at(job, next, 0), block_at(job, next, 1)},
        .next_bytes = count * (format->block_bytes ? format->block_bytes : BLOCK_ROWS * format->block_columns),
        .count = count,
        .column_tiles = count * tiles,
        .x = (const uint16_t *)job->x + at.column * tiles * token_tiles * TILE * TILE_COLUMNS,
        .token_tiles = token_tiles,
        .sums = sums,
        .begin = begin,
        .end = end,
        .first = at.column == 0,
        .last = at.column + count == job->column_blocks,
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
static void run_task(const struct job *job, float *sums, int64_t first, int64_t last) {
    int few = up(job->tokens, TILE) <= FEW_TILES, more = 1;
    int64_t sums_of_pair = up(job->tokens, TILE) * 2 * TILE * BLOCK_ROWS;
    struct place at = {first, 0}, next;
    for (int begin = 1; more; begin = 0, at = next) {
        next = at;
        if (few && (next.column += job->step) >= job->column_blocks) next = (struct place){at.pair + 1, 0};
        if (!few && ++next.pair == last) next = (struct place){first, at.column + job->step};
        more = next.pair < last && next.column < job->column_blocks;
        run_panel(job, sums + (few ? 0 : (at.pair - first) * sums_of_pair), at, next, begin, !more);
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
    int64_t sums_size = most_tokens * 2 * BLOCK_ROWS * (most_tokens <= FEW_TILES * TILE ? 1 : step);
    char *prepared = scratch_of_thread((size_t)(x_bytes + workers * sums_size * 4));
    if (!prepared) return 1;
    float *sums = (float *)(prepared + x_bytes);
    for (int64_t start = 0; start < tokens; start += TOKENS_AT_ONCE) {
        const char *from = (const char *)x + start * columns * size;
        int64_t count = least(TOKENS_AT_ONCE, tokens - start), token_tiles = up(count, TILE);
        int64_t blocks_of_panel = (token_tiles <= FEW_TILES ? FEW_COLUMNS : PANEL_COLUMNS) / format->block_columns;
        struct job job = {
            .format = format,
            .panel = (panel_fn *)(void (*)(void))panel,
            .blocks = blocks,
            .x = prepared,
            .bias = bias,
            .y = (char *)y + start * rows * size,
            .row_blocks = row_blocks,
            .column_blocks = column_blocks,
            .rows = rows,
            .tokens = count,
            .step = blocks_of_panel < 1 ? 1 : blocks_of_panel,
            .type = type,
        };
        int64_t panel_tiles = job.step * format->block_columns / TILE_COLUMNS;
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
        for (int64_t tile = 0; tile < token_tiles; tile++)
            prepare(prepared, from + tile * TILE * columns * size, type, columns, column_tiles, panel_tiles, token_tiles,
                    tile, least(TILE, count - tile * TILE));
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers) if (workers > 1)
        for (int64_t pair = 0; pair < pairs; pair += step)
            run_task(&job, sums + thread_number() * sums_size, pair, least(pair + step, pairs));
    }
    return 0;
}
