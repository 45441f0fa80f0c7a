/* One token through all decoder blocks of a Llama. Between the linears there are some dozen small operators a block,
 * which take torch longer than they compute; here they are loops. All is float32 but weights and the cache. */
#include "kernel.h"

#include <math.h>

typedef void rows_fn(float *y, const float *x, const void *weights, const int32_t *index, int64_t active,
                     int64_t columns, int64_t tokens, int type); /* those of active.h */

struct weight {
    const struct format *format;
    tile_fn *tile;
    const void *blocks;
    const float *bias;    /* or NULL */
    const int32_t *order; /* its inputs in the order that its columns are packed in, or NULL if that is theirs */
    int64_t rows, columns;
};

struct block {
    const float *attention_norm, *mlp_norm;
    struct weight q, k, v, o, gate, up, down;
    void *keys, *values; /* (key heads, length, head size) of `type` */
};

struct decoder {
    const struct block *blocks;
    const float *last_norm;
    int64_t count, hidden, inner, heads, key_heads, head_size, length;
    float epsilon, scale;
    int type;
    rows_fn *active_rows, *active_columns;
    const int32_t *index; /* 0, 1, .. length - 1 */
    float *memory;        /* 2 hidden + 2 inner + (2 heads + 2 key heads) * head size + heads * length */
    float *gathered;      /* inputs of any linear */
};

/* e^x to two units in the last place; 0 below -87. Written so that compilers make vectors of it.
 * Source: argument reduction by multiples of ln 2 in two parts, then the series up to x^7. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number, in the low bits */
    float whole = shifted - 12582912.0f;
    float r = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000u + 127u) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static void norm(float *to, const float *x, const float *weight, int64_t size, float epsilon) {
    float squares = 0;
    for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
    float by = 1.0f / sqrtf(squares / (float)size + epsilon);
    for (int64_t i = 0; i < size; i++) to[i] = x[i] * by * weight[i];
}

/* Rotary positions: the first half of a head is turned against its second. cos, sin: (size,) of the position. */
static void rotate(float *heads, int64_t count, int64_t size, const float *cos, const float *sin) {
    for (int64_t half = size / 2; count; count--, heads += size)
        for (int64_t i = 0; i < half; i++) {
            float one = heads[i], two = heads[half + i];
            heads[i] = one * cos[i] - two * sin[i];
            heads[half + i] = two * cos[half + i] + one * sin[half + i];
        }
}

/* Put what the token has for each key head into its place of the cache. */
static void remember(const struct decoder *decoder, void *cache, const float *heads, int64_t position) {
    int64_t size = decoder->head_size;
    for (int64_t head = 0; head < decoder->key_heads; head++)
        for (int64_t i = 0; i < size; i++) {
            int64_t at = (head * decoder->length + position) * size + i;
            if (decoder->type == FLOAT32) ((float *)cache)[at] = heads[head * size + i];
            else ((uint16_t *)cache)[at] = to_bfloat16(heads[head * size + i]);
        }
}

static void softmax(float *scores, int64_t count, float scale) {
    float largest = scores[0], total = 0;
    for (int64_t i = 1; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = 0; i < count; i++) scores[i] = exponential((scores[i] - largest) * scale);
    for (int64_t i = 0; i < count; i++) total += scores[i];
    for (int64_t i = 0; i < count; i++) scores[i] /= total;
}

/* What the heads of queries find among the first `count` places of the cache. */
static void attend(const struct decoder *decoder, const struct block *block, float *found, const float *q,
                   float *scores, int64_t count) {
    int64_t size = decoder->head_size, group = decoder->heads / decoder->key_heads;
    int64_t bytes = decoder->length * size * (decoder->type == FLOAT32 ? 4 : 2);
    memset(found, 0, sizeof *found * (size_t)(decoder->heads * size));
#pragma omp parallel for schedule(static) if (decoder->heads * size * count > 1 << 15)
    for (int64_t head = 0; head < decoder->key_heads; head++) {
        const char *keys = (const char *)block->keys + head * bytes, *values = (const char *)block->values + head * bytes;
        float *of_head = scores + head * group * count;
        decoder->active_rows(of_head, q + head * group * size, keys, decoder->index, count, size, group, decoder->type);
        for (int64_t i = 0; i < group; i++) softmax(of_head + i * count, count, decoder->scale);
        decoder->active_columns(found + head * group * size, of_head, values, decoder->index, count, size, group,
                                decoder->type);
    }
}

static int apply(float *y, const float *x, const struct weight *weight, float *gathered) {
    if (weight->order) {
        for (int64_t i = 0; i < weight->columns; i++) gathered[i] = x[weight->order[i]];
        x = gathered;
    }
    return linear(weight->format, weight->tile, y, x, weight->bias, weight->blocks, 1, weight->rows, weight->columns,
                  FLOAT32);
}

/* state (hidden,): the token's embedding, and then what the output head is given. cos, sin: (head size,) of `position`,
 * which is below `length`. Returns 0, or 1 if there is no memory for the inputs of a linear. */
int decode(const struct decoder *decoder, float *state, const float *cos, const float *sin, int64_t position) {
    int64_t hidden = decoder->hidden, inner = decoder->inner, size = decoder->head_size;
    float *x = decoder->memory, *y = x + hidden, *gate = y + hidden, *up = gate + inner, *q = up + inner;
    float *found = q + decoder->heads * size, *k = found + decoder->heads * size, *v = k + decoder->key_heads * size;
    float *scores = v + decoder->key_heads * size, *gathered = decoder->gathered;
    for (const struct block *block = decoder->blocks; block < decoder->blocks + decoder->count; block++) {
        norm(x, state, block->attention_norm, hidden, decoder->epsilon);
        if (apply(q, x, &block->q, gathered) || apply(k, x, &block->k, gathered)) return 1;
        if (apply(v, x, &block->v, gathered)) return 1;
        rotate(q, decoder->heads, size, cos, sin);
        rotate(k, decoder->key_heads, size, cos, sin);
        remember(decoder, block->keys, k, position);
        remember(decoder, block->values, v, position);
        attend(decoder, block, found, q, scores, position + 1);
        if (apply(y, found, &block->o, gathered)) return 1;
        for (int64_t i = 0; i < hidden; i++) state[i] += y[i];
        norm(x, state, block->mlp_norm, hidden, decoder->epsilon);
        if (apply(gate, x, &block->gate, gathered) || apply(up, x, &block->up, gathered)) return 1;
        for (int64_t i = 0; i < inner; i++) up[i] *= gate[i] / (1.0f + exponential(-gate[i])); /* SiLU */
        if (apply(y, up, &block->down, gathered)) return 1;
        for (int64_t i = 0; i < hidden; i++) state[i] += y[i];
    }
    norm(state, state, decoder->last_norm, hidden, decoder->epsilon);
    return 0;
}
