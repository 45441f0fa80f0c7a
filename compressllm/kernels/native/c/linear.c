/* y = x W^T + b by any kernel: tokens are cut into tiles, rows over threads. */
#include "kernel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    TOKENS_AT_ONCE = 128,          /* whose prepared inputs are held at a time */
    ROW_BLOCKS_AT_ONCE = 8,        /* of one task, at most: small tasks even out what others take of a core */
    TASK_BYTES = 1 << 18,          /* of weights in a task of few tokens, about */
    SCRATCH_BYTES = 8 << 20,       /* prepared inputs, at most, where a tile is not larger */
    BYTES_WORTH_THREADS = 1 << 16, /* of weights read; below, waking a thread costs more than it saves */
};

int64_t threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads(); /* torch's own setting: the pool is torch's */
#else
    return 1;
#endif
}

struct job {
    const struct format *format;
    tile_fn *tile;
    const char *blocks, *prepared;
    int64_t row_blocks, column_blocks, rows;
    const void *bias;
    int type;
};

/* Store the sums of `tokens` tokens and of rows first_row.. into y, whose rows are `rows` long, adding the bias. */
static void finish(const struct job *job, char *y, const float *sums, int64_t stride, int64_t tokens,
                   int64_t first_row) {
    int64_t rows = least(stride, job->rows - first_row);
    float bias[ROW_BLOCKS_AT_ONCE * BLOCK_ROWS] = {0};
    for (int64_t r = 0; job->bias && r < rows; r++) {
        if (job->type == FLOAT32) bias[r] = ((const float *)job->bias)[first_row + r];
        else bias[r] = from_bfloat16(((const uint16_t *)job->bias)[first_row + r]);
    }
    for (int64_t t = 0; t < tokens; t++) {
        const float *from = sums + t * stride;
        if (job->type == FLOAT32) {
            float *to = (float *)y + t * job->rows + first_row;
            for (int64_t r = 0; r < rows; r++) to[r] = from[r] + bias[r];
        } else {
            uint16_t *to = (uint16_t *)y + t * job->rows + first_row;
            for (int64_t r = 0; r < rows; r++) to[r] = to_bfloat16(from[r] + bias[r]);
        }
    }
}

/* Add to sums the products of one row block, `count` blocks from `column` on. */
static void run_tiles(const struct job *job, float *sums, int64_t stride, int64_t tokens, int64_t block, int64_t column,
                      int64_t count) {
    const struct format *format = job->format;
    int64_t all = job->column_blocks;
    int64_t at = block * all + column;
    const char *weights = job->blocks + (format->block_bytes ? at * format->block_bytes : ((int64_t *)job->blocks)[at]);
    for (int64_t token = 0; token < tokens; token += format->tile_tokens) {
        int64_t size = least(format->tile_tokens, tokens - token);
        const char *x = job->prepared + (token * all + column * size) * format->x_bytes;
        job->tile(sums + token * stride, stride, x, weights, count, (int)size);
    }
}

/* Row blocks first..last of up to TOKENS_AT_ONCE tokens. One sum is always made in the same order. */
static void run_task(const struct job *job, char *y, int64_t tokens, int64_t first, int64_t last) {
    _Alignas(64) float sums[TOKENS_AT_ONCE * ROW_BLOCKS_AT_ONCE * BLOCK_ROWS];
    int64_t stride = (last - first) * BLOCK_ROWS, all = job->column_blocks;
    int64_t step = job->format->columns_at_once / job->format->block_columns;
    memset(sums, 0, sizeof(float) * (size_t)(tokens * stride));
    /* With few tokens a row block is read from end to end; with many, the row blocks share a part of the inputs. */
    int64_t together = tokens <= job->format->tile_tokens ? 1 : last - first;
    for (int64_t group = first; group < last; group += together)
        for (int64_t column = 0; column < all; column += step)
            for (int64_t block = group; block < least(group + together, last); block++)
                run_tiles(job, sums + (block - first) * BLOCK_ROWS, stride, tokens, block, column,
                          least(step, all - column));
    finish(job, y, sums, stride, tokens, first * BLOCK_ROWS);
}

static void prepare_tokens(const struct job *job, char *to, const char *x, int64_t tokens, int64_t columns,
                           int64_t workers) {
    const struct format *format = job->format;
    int64_t token_bytes = format->x_bytes * job->column_blocks, x_bytes = columns * (job->type == FLOAT32 ? 4 : 2);
    int64_t tile = format->tile_tokens;
    if (tokens <= tile) format->prepare(to, x, job->type, columns, (int)tokens);
    else {
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
        for (int64_t token = 0; token < tokens; token += tile)
            format->prepare(to + token * token_bytes, x + token * x_bytes, job->type, columns,
                            (int)least(tile, tokens - token));
    }
}

/* y (tokens, rows) = x (tokens, columns) W^T + bias (rows) or NULL, all contiguous and of `type`.
 * Sums are float32 and rounded once. Returns 0, or 1 if there is no memory for the prepared inputs. */
int linear(const struct format *format, tile_fn *tile, void *y, const void *x, const void *bias, const void *blocks,
           int64_t tokens, int64_t rows, int64_t columns, int type) {
    if (!tokens) return 0;
    if (format->linear) return format->linear(format, tile, y, x, bias, blocks, tokens, rows, columns, type);
    int64_t column_blocks = (columns + format->block_columns - 1) / format->block_columns;
    int64_t row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t token_bytes = format->x_bytes * column_blocks, size = type == FLOAT32 ? 4 : 2;
    int64_t tile_bytes = token_bytes * format->tile_tokens, tiles = SCRATCH_BYTES / tile_bytes;
    int64_t at_once = least(tokens, least(TOKENS_AT_ONCE, (tiles < 1 ? 1 : tiles) * format->tile_tokens));
    char *prepared = scratch_of_thread((size_t)(token_bytes * at_once));
    if (!prepared) return 1;
    struct job job = {format, tile, blocks, prepared, row_blocks, column_blocks, rows, bias, type};
    int64_t block_bytes = format->block_bytes ? format->block_bytes : BLOCK_ROWS * format->block_columns;
    int64_t work = row_blocks * column_blocks * block_bytes * (1 + tokens / 4);
    int64_t workers = work < BYTES_WORTH_THREADS ? 1 : threads();
    int64_t most = tokens > format->tile_tokens ? ROW_BLOCKS_AT_ONCE : TASK_BYTES / (column_blocks * block_bytes);
    int64_t step = least(row_blocks / (workers * 4), least(most, ROW_BLOCKS_AT_ONCE));
    step = step < 1 ? 1 : step;
    for (int64_t start = 0; start < tokens; start += at_once) {
        int64_t count = least(at_once, tokens - start);
        char *to = (char *)y + start * rows * size;
        prepare_tokens(&job, prepared, (const char *)x + start * columns * size, count, columns, workers);
        if (workers == 1)
            for (int64_t block = 0; block < row_blocks; block += step)
                run_task(&job, to, count, block, least(block + step, row_blocks));
        else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
            for (int64_t block = 0; block < row_blocks; block += step)
                run_task(&job, to, count, block, least(block + step, row_blocks));
        }
    }
    return 0;
}
