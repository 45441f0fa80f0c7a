// Few tokens times a 2:4 weight on the sparse tensor cores of a GPU: each kept weight and its 2 bits of position are
// read once, straight into the registers that mma.sp wants them in; nothing is expanded.
//
// The weight lies as fragments.py has it: for each 16 rows and 256 columns, LOADS times 32 lanes of 16 bytes of values,
// then 32 lanes of 16 bytes of positions. A block goes through its share of the rows, 16 * ROW_TILES at a time, with
// 8 * TOKEN_TILES tokens. Each of its warps multiplies every WARPS-th tile of them, its next AHEAD tiles being on their
// way, also those of the rows that come after; then the warps add up, in order.
//
// Compiled at run time with:
//   BITS 16, 8 or 4; FLOAT8 (8 bits are e4m3); HALF (numbers are float16, else bfloat16)
//   GROUP: columns that share a scale, 32, 64 or 128; 0 if a row has one; -1 if there are none
//   ROW_TILES, TOKEN_TILES, WARPS, AHEAD, RAGGED (columns are not a multiple of 256), BIAS
//   STAGED: a block keeps its tokens' activations in shared memory, in the order the products take them
//   EXPAND, with BITS, FLOAT8, HALF and GROUP alone: not the product, but the weight as it is without a mask
//
// Includes nothing, so that no CUDA headers are needed. EMULATED is for running it on a CPU, one thread a lane.

typedef unsigned int u32;
typedef unsigned short u16;

#define LOADS (BITS / 2)
#define STEPS 8  // of 32 columns, in a tile

#ifndef EMULATED
#define DEVICE __device__ __forceinline__

struct alignas(16) Four { u32 a[4]; };

// Weights are read once: they must not push the activations out of the L1 cache.
DEVICE Four load_weight(const Four* at) {
    Four v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.a[0]), "=r"(v.a[1]), "=r"(v.a[2]), "=r"(v.a[3]) : "l"(at));
    return v;
}

DEVICE Four load_x(const u16* at) {
    Four v;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.a[0]), "=r"(v.a[1]), "=r"(v.a[2]), "=r"(v.a[3]) : "l"(at));
    return v;
}

DEVICE u32 from_neighbour(u32 value) { return __shfl_xor_sync(0xffffffffu, value, 1); }

#if HALF
#define KIND "f16"
#else
#define KIND "bf16"
#endif

// Two 16-bit numbers at once: a * b + c.
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn." KIND "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

#define MMA_SP(SELECTOR)                                                                                               \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, "          \
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " SELECTOR ";"                                  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions))

template <int SELECTOR>
DEVICE void mma_sp(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 positions) {
    if (SELECTOR == 0) MMA_SP("0x0");
    else MMA_SP("0x1");
}

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float number) { return __float_as_uint(number); }

DEVICE float widened(u16 number) {
#if HALF
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(number));
    return result;
#else
    return as_float((u32)number << 16);
#endif
}

DEVICE u16 rounded(float number) {
    u16 result;
    asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(result) : "f"(number));
    return result;
}
#endif

#if HALF
#define ONE 0x3C003C00u
#else
#define ONE 0x3F803F80u
#endif

#define WORDS (BITS / 4)  // of a lane's values, in a step

// Registers a0 to a3 of one step, from its words of a lane's values. Integers and float8 are put where a 16-bit float
// has its bits, two at a time; one exact operation then takes away what that added.
DEVICE void operand(u32 (&a)[4], const u32* words) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 16
        a[i] = words[i];
#elif BITS == 8
        const u32 pair = words[i / 2] >> (i % 2 * 8);
#if FLOAT8 && HALF  // exponent and mantissa to their places: too small by 2^8
        a[i] = fma2((pair & 0x007f007fu) << 7 | (pair & 0x00800080u) << 8, 0x5C005C00u, 0x80008000u);
#elif FLOAT8  // too small by 2^120
        a[i] = fma2((pair & 0x007f007fu) << 4 | (pair & 0x00800080u) << 8, 0x7B807B80u, 0x80008000u);
#elif HALF  // 1024 + 128 + v, less that
        a[i] = fma2(((pair ^ 0x00800080u) & 0x00ff00ffu) | 0x64006400u, ONE, 0xE480E480u);
#else  // 128 and the lower 7 bits; less 128, or 256 if v is negative
        a[i] = fma2((pair & 0x007f007fu) | 0x43004300u, ONE, (pair & 0x00800080u) | 0xC300C300u);
#endif
#elif HALF  // 1024 + 8 + v, less that
        a[i] = fma2(((words[0] >> (4 * i)) & 0x000f000fu) | 0x64006400u, ONE, 0xE408E408u);
#else  // 128 + 8 + v, less that
        a[i] = fma2(((words[0] >> (4 * i)) & 0x000f000fu) | 0x43004300u, ONE, 0xC308C308u);
#endif
    }
}

#ifdef EXPAND

// The whole weight, for many tokens: one lane of a warp and one step a thread.
extern "C" __global__ void __launch_bounds__(32 * STEPS) expand(
    const Four* packed,   // (row_blocks, tiles, LOADS + 1, 32) of 16 bytes
    const float* scales,  // (groups, rows), if there are any
    u16* out,             // (rows, columns)
    int rows, int columns, int tiles, int groups
) {
    const int lane = threadIdx.x, step = threadIdx.y, q = lane % 4, g = lane / 4;
    const long long tile = (long long)blockIdx.x * tiles + blockIdx.y;
    const Four* at = packed + tile * ((LOADS + 1) * 32);
    const Four values = load_weight(at + 32 * (step * WORDS / 4) + lane);
    u32 a[4];
    operand(a, values.a + step * WORDS % 4);
    const Four* positions = at + 32 * LOADS + 4 * g + 2 * (step % 2);  // of two lanes, each of four groups
    for (int half = 0; half < 2; half++) {  // groups q and q + 4 as the product counts them
        const int counted = q + 4 * half, group = counted % 2 * 4 + counted / 2;
        const int column = 256 * (int)blockIdx.y + 32 * step + 4 * group;
        const u32 word = positions[half].a[step / 2] >> (4 * q);
        for (int hi = 0; hi < 2; hi++) {
            const int row = blockIdx.x * 16 + g + 8 * hi;
            const u32 where = word >> (16 * hi), pair = a[2 * half + hi];
            u16 low = (u16)pair, high = (u16)(pair >> 16);
#if GROUP >= 0
            const int scale = GROUP ? column / (GROUP ? GROUP : 1) : 0;
            const float times = scales[(long long)(scale < groups ? scale : groups - 1) * rows + row];
            low = rounded(widened(low) * times);
            high = rounded(widened(high) * times);
#endif
            const unsigned long long four =
                (unsigned long long)low << (16 * (where & 3)) | (unsigned long long)high << (16 * (where >> 2 & 3));
            if (column < columns) *(unsigned long long*)(out + (long long)row * columns + column) = four;
        }
    }
}

#else

// x of one step for one lane's token: lane q of a group reads 8 columns in a row, and trades with its neighbour so that
// the even one has the first two, and the odd one the last two, of each of four groups of 4 columns.
DEVICE void trade(u32 (&b)[4], const Four& x, u32 q) {
    const bool odd = q & 1;
    const u32 one = from_neighbour(odd ? x.a[0] : x.a[1]);
    const u32 two = from_neighbour(odd ? x.a[2] : x.a[3]);
    b[0] = odd ? one : x.a[0];
    b[1] = odd ? two : x.a[2];
    b[2] = odd ? x.a[1] : one;
    b[3] = odd ? x.a[3] : two;
}

#if STAGED
#ifndef EMULATED
extern __shared__ Four staged[];  // (steps, tokens of the block, 4)
#endif

// Fill it, all warps together: what `trade` would give each lane.
DEVICE void stage(const u16* x, int tokens, int columns, int steps) {
    const int pairs = steps * tokens * 2;
    for (int at = threadIdx.y * 32 + threadIdx.x; at < pairs; at += WARPS * 32) {
        const int pair = at % 2, step = at / 2 % steps, token = at / 2 / steps;
        const int column = 32 * step + 16 * pair;
        Four even = {{0, 0, 0, 0}}, odd = {{0, 0, 0, 0}};
        const u16* from = x + (long long)token * columns + column;
        if (!RAGGED || column < columns) even = load_x(from);
        if (!RAGGED || column + 8 < columns) odd = load_x(from + 8);
        Four* to = staged + ((step * tokens + token) * 4 + 2 * pair);
        to[0] = Four{{even.a[0], even.a[2], odd.a[0], odd.a[2]}};
        to[1] = Four{{even.a[1], even.a[3], odd.a[1], odd.a[3]}};
    }
}
#endif

#define SCALES (GROUP > 0 ? 256 / (GROUP > 0 ? GROUP : 256) : 1)

struct Tile {
    Four values[ROW_TILES][LOADS];
    Four positions[ROW_TILES];
#if GROUP > 0
    float scales[ROW_TILES][SCALES][2];
#endif
};

// A tile on a warp's way: of which rows, and which columns.
struct Place {
    int rows, tile;
};

DEVICE void load_tile(
    Tile& tile, const Four* packed, const float* scales, Place place, int tiles, int rows, int row_blocks, int groups
) {
    const int lane = threadIdx.x;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        int block = place.rows * ROW_TILES + r;
        block = block < row_blocks ? block : row_blocks - 1;  // computed, never stored
        const Four* at = packed + ((long long)block * tiles + place.tile) * ((LOADS + 1) * 32) + lane;
#pragma unroll
        for (int i = 0; i < LOADS; i++) tile.values[r][i] = load_weight(at + 32 * i);
        tile.positions[r] = load_weight(at + 32 * LOADS);
#if GROUP > 0
#pragma unroll
        for (int s = 0; s < SCALES; s++) {
            int group = place.tile * SCALES + s;
            group = group < groups ? group : groups - 1;
#pragma unroll
            for (int half = 0; half < 2; half++)
                tile.scales[r][s][half] = scales[(long long)group * rows + block * 16 + lane / 4 + 8 * half];
        }
#endif
    }
}

template <int STEP>
DEVICE void multiply(
    float (&total)[ROW_TILES][TOKEN_TILES][4], float (&part)[ROW_TILES][TOKEN_TILES][4], const Tile& tile,
    const Four (&x)[TOKEN_TILES], u32 q
) {
    u32 b[TOKEN_TILES][4];
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++) {
#if STAGED
        for (int i = 0; i < 4; i++) b[t][i] = x[t].a[i];
#else
        trade(b[t], x[t], q);
#endif
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        u32 a[4];
        operand(a, tile.values[r][STEP * WORDS / 4].a + STEP * WORDS % 4);
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) {
#if GROUP > 0
            if (STEP % (GROUP / 32) == 0)
                for (int i = 0; i < 4; i++) part[r][t][i] = 0.0f;
            mma_sp<STEP % 2>(part[r][t], a, b[t], tile.positions[r].a[STEP / 2]);
            if (STEP % (GROUP / 32) == GROUP / 32 - 1)
                for (int i = 0; i < 4; i++) total[r][t][i] += part[r][t][i] * tile.scales[r][STEP * 32 / GROUP][i / 2];
#else
            mma_sp<STEP % 2>(total[r][t], a, b[t], tile.positions[r].a[STEP / 2]);
#endif
        }
    }
}

// Activations of one step, for each lane those of its tokens.
DEVICE void load_step(
    Four (&x)[TOKEN_TILES], const Four* const (&near)[TOKEN_TILES], const u16* const (&far)[TOKEN_TILES], int step,
    int tokens, int ends
) {
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++) {
#if STAGED
        x[t] = near[t][4 * tokens * step];
#else
#if RAGGED
        if (32 * step >= ends) {  // columns are a multiple of 8
            for (int i = 0; i < 4; i++) x[t].a[i] = 0;
            continue;
        }
#endif
        x[t] = load_x(far[t] + 32 * step);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) sparse_mma(
    const Four* packed,   // (row_blocks, tiles, LOADS + 1, 32) of 16 bytes
    const u16* x,         // (tokens, columns), 16-bit floats
    const float* scales,  // (groups, rows), if there are any
    const u16* bias,      // (rows), if there is one
    u16* out,             // (tokens, rows)
    int tokens, int rows, int columns, int tiles, int groups
) {
    __shared__ float sums[WARPS][ROW_TILES * TOKEN_TILES * 4][32];
    const int lane = threadIdx.x, warp = threadIdx.y, q = lane % 4, g = lane / 4;
    const int row_blocks = rows / 16, turns = (row_blocks + ROW_TILES - 1) / ROW_TILES;
    const int first = blockIdx.y * 8 * TOKEN_TILES;
    const int here = tokens - first < 8 * TOKEN_TILES ? tokens - first : 8 * TOKEN_TILES;
    x += (long long)first * columns;

    Tile ahead[AHEAD];
    Place place = {(int)blockIdx.x, warp};
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        if (place.rows < turns) load_tile(ahead[i], packed, scales, place, tiles, rows, row_blocks, groups);
        place.tile += WARPS;
        if (place.tile >= tiles) place = {place.rows + (int)gridDim.x, warp};
    }
    const Four* near[TOKEN_TILES];
    const u16* far[TOKEN_TILES];
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++) {
        const int token = 8 * t + g < here ? 8 * t + g : here - 1;  // tokens of a product do not touch each other
        far[t] = x + (long long)token * columns + 8 * q;
#if STAGED
        near[t] = staged + 4 * token + q;
#else
        near[t] = 0;
#endif
    }
#if STAGED
    stage(x, here, columns, tiles * STEPS);
    __syncthreads();
#endif
    for (int turn = blockIdx.x; turn < turns; turn += gridDim.x) {
        float total[ROW_TILES][TOKEN_TILES][4], part[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            for (int t = 0; t < TOKEN_TILES; t++)
                for (int i = 0; i < 4; i++) total[r][t][i] = part[r][t][i] = 0.0f;
#pragma unroll 1
        for (int index = warp; index < tiles; index += WARPS) {
            Four seen[STEPS][TOKEN_TILES];
            const int step = index * STEPS, ends = columns - 8 * q;
            if (!STAGED) {  // memory is far: ask for all at once
#pragma unroll
                for (int s = 0; s < STEPS; s++) load_step(seen[s], near, far, step + s, here, ends);
            }
            const Tile tile = ahead[0];
#pragma unroll
            for (int i = 1; i < AHEAD; i++) ahead[i - 1] = ahead[i];
            if (place.rows < turns) load_tile(ahead[AHEAD - 1], packed, scales, place, tiles, rows, row_blocks, groups);
            place.tile += WARPS;
            if (place.tile >= tiles) place = {place.rows + (int)gridDim.x, warp};
#define TURN(s)                                                                                                        \
    if (STAGED) load_step(seen[s], near, far, step + s, here, ends);                                                   \
    multiply<s>(total, part, tile, seen[s], q)
            TURN(0);
            TURN(1);
            TURN(2);
            TURN(3);
            TURN(4);
            TURN(5);
            TURN(6);
            TURN(7);
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            for (int t = 0; t < TOKEN_TILES; t++)
                for (int i = 0; i < 4; i++) sums[warp][(r * TOKEN_TILES + t) * 4 + i][lane] = total[r][t][i];
        __syncthreads();
        for (int at = warp * 32 + lane; at < ROW_TILES * TOKEN_TILES * 128; at += WARPS * 32) {
            const int number = at / 32, from = at % 32;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[w][number][from];
            const int i = number % 4, t = number / 4 % TOKEN_TILES, r = number / 4 / TOKEN_TILES;
            const int row = (turn * ROW_TILES + r) * 16 + from / 4 + i / 2 * 8;
            const int token = 8 * t + from % 4 * 2 + i % 2;
            if (row >= rows || token >= here) continue;
#if GROUP == 0
            sum *= scales[row];
#endif
#if BIAS
            sum += widened(bias[row]);
#endif
            out[(long long)(first + token) * rows + row] = rounded(sum);
        }
        __syncthreads();  // the sums are written again
    }
}

#endif
