// Few tokens times a 2:4 weight on the sparse tensor cores of a GPU: each kept weight and its 2 bits of position are
// read once, straight into the registers that mma.sp wants them in; nothing is expanded.
//
// The weight lies as fragments.py has it: for each 16 rows and 256 columns, LOADS times 32 lanes of 16 bytes of values,
// then 32 lanes of 16 bytes of positions. One warp multiplies 16 * ROW_TILES rows by every WARPS-th such tile and by
// 8 * TOKEN_TILES tokens; the warps of a block share its rows and add up at the end, in order.
//
// Compiled at run time with:
//   BITS 16, 8 or 4; FLOAT8 (8 bits are e4m3); HALF (numbers are float16, else bfloat16)
//   GROUP: columns that share a scale, 32, 64 or 128; 0 if a row has one; -1 if there are none
//   ROW_TILES, TOKEN_TILES, WARPS, RAGGED (columns are not a multiple of 256), BIAS
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

// Registers a0 to a3 of one step, from a lane's values of the whole tile. Integers and float8 are put where a 16-bit
// float has its bits, two at a time; one exact operation then takes away what that added.
template <int STEP>
DEVICE void operand(u32 (&a)[4], const Four (&values)[LOADS]) {
#if BITS == 16
    for (int i = 0; i < 4; i++) a[i] = values[STEP].a[i];
#elif BITS == 8
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 pair = values[STEP / 2].a[STEP % 2 * 2 + i / 2] >> (i % 2 * 8);
#if FLOAT8 && HALF  // exponent and mantissa to their places: too small by 2^8
        a[i] = fma2((pair & 0x007f007fu) << 7 | (pair & 0x00800080u) << 8, 0x5C005C00u, 0x80008000u);
#elif FLOAT8  // too small by 2^120
        a[i] = fma2((pair & 0x007f007fu) << 4 | (pair & 0x00800080u) << 8, 0x7B807B80u, 0x80008000u);
#elif HALF  // 1024 + 128 + v, less that
        a[i] = fma2(((pair ^ 0x00800080u) & 0x00ff00ffu) | 0x64006400u, ONE, 0xE480E480u);
#else  // 128 and the lower 7 bits; less 128, or 256 if v is negative
        a[i] = fma2((pair & 0x007f007fu) | 0x43004300u, ONE, (pair & 0x00800080u) | 0xC300C300u);
#endif
    }
#else
    const u32 word = values[STEP / 4].a[STEP % 4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if HALF  // 1024 + 8 + v, less that
        a[i] = fma2(((word >> (4 * i)) & 0x000f000fu) | 0x64006400u, ONE, 0xE408E408u);
#else  // 128 + 8 + v, less that
        a[i] = fma2(((word >> (4 * i)) & 0x000f000fu) | 0x43004300u, ONE, 0xC308C308u);
#endif
    }
#endif
}

// One lane's view of the work.
struct Lane {
    int lane, warp, row_block, first_token;
    u32 q, g;  // place in its group of 4 lanes, and which group
};

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

#define SCALES (GROUP > 0 ? 256 / (GROUP > 0 ? GROUP : 256) : 1)

struct Tile {
    Four values[ROW_TILES][LOADS];
    Four positions[ROW_TILES];
#if GROUP > 0
    float scales[ROW_TILES][SCALES][2];
#endif
};

DEVICE void load_tile(
    Tile& tile, const Lane& me, const Four* packed, const float* scales, int index, int tiles, int rows, int row_blocks,
    int groups
) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        int block = me.row_block + r;
        block = block < row_blocks ? block : row_blocks - 1;  // computed, never stored
        const Four* at = packed + ((long long)block * tiles + index) * ((LOADS + 1) * 32) + me.lane;
#pragma unroll
        for (int i = 0; i < LOADS; i++) tile.values[r][i] = load_weight(at + 32 * i);
        tile.positions[r] = load_weight(at + 32 * LOADS);
#if GROUP > 0
#pragma unroll
        for (int s = 0; s < SCALES; s++) {
            int group = index * SCALES + s;
            group = group < groups ? group : groups - 1;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = block * 16 + me.g + 8 * half;
                tile.scales[r][s][half] = scales[(long long)group * rows + (row < rows ? row : rows - 1)];
            }
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
    for (int t = 0; t < TOKEN_TILES; t++) trade(b[t], x[t], q);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        u32 a[4];
        operand<STEP>(a, tile.values[r]);
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

DEVICE void load_step(Four (&x)[TOKEN_TILES], const u16* const (&rows)[TOKEN_TILES], int column, int columns) {
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++) {
#if RAGGED
        if (column >= columns) {  // columns are a multiple of 8
            for (int i = 0; i < 4; i++) x[t].a[i] = 0;
            continue;
        }
#endif
        x[t] = load_x(rows[t] + column);
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
    Lane me;
    me.lane = threadIdx.x;
    me.warp = threadIdx.y;
    me.row_block = blockIdx.x * ROW_TILES;
    me.first_token = blockIdx.y * 8 * TOKEN_TILES;
    me.q = me.lane % 4;
    me.g = me.lane / 4;
    const int row_blocks = (rows + 15) / 16;

    const u16* from[TOKEN_TILES];
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++) {
        int token = me.first_token + 8 * t + me.g;
        token = token < tokens ? token : tokens - 1;  // columns of the product do not touch each other
        from[t] = x + (long long)token * columns + 8 * me.q;
    }
    float total[ROW_TILES][TOKEN_TILES][4], part[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
        for (int t = 0; t < TOKEN_TILES; t++)
            for (int i = 0; i < 4; i++) total[r][t][i] = part[r][t][i] = 0.0f;

    // The next tile is on its way while this one is multiplied.
    Tile tile, next;
    if (me.warp < tiles) load_tile(next, me, packed, scales, me.warp, tiles, rows, row_blocks, groups);
    for (int index = me.warp; index < tiles; index += WARPS) {
        tile = next;
        const int column = 256 * index, ends = columns - 8 * (int)me.q;
        Four seen[STEPS][TOKEN_TILES];
#pragma unroll
        for (int s = 0; s < STEPS; s++) load_step(seen[s], from, column + 32 * s, ends);
        if (index + WARPS < tiles)
            load_tile(next, me, packed, scales, index + WARPS, tiles, rows, row_blocks, groups);
        multiply<0>(total, part, tile, seen[0], me.q);
        multiply<1>(total, part, tile, seen[1], me.q);
        multiply<2>(total, part, tile, seen[2], me.q);
        multiply<3>(total, part, tile, seen[3], me.q);
        multiply<4>(total, part, tile, seen[4], me.q);
        multiply<5>(total, part, tile, seen[5], me.q);
        multiply<6>(total, part, tile, seen[6], me.q);
        multiply<7>(total, part, tile, seen[7], me.q);
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
        for (int t = 0; t < TOKEN_TILES; t++)
            for (int i = 0; i < 4; i++) sums[me.warp][(r * TOKEN_TILES + t) * 4 + i][me.lane] = total[r][t][i];
    __syncthreads();
    for (int at = me.warp * 32 + me.lane; at < ROW_TILES * TOKEN_TILES * 128; at += WARPS * 32) {
        const int number = at / 32, lane = at % 32;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w][number][lane];
        const int i = number % 4, t = number / 4 % TOKEN_TILES, r = number / 4 / TOKEN_TILES;
        const int row = (me.row_block + r) * 16 + lane / 4 + i / 2 * 8;
        const int token = me.first_token + 8 * t + lane % 4 * 2 + i % 2;
        if (row >= rows || token >= tokens) continue;
#if GROUP == 0
        sum *= scales[row];
#endif
#if BIAS
        sum += widened(bias[row]);
#endif
        out[(long long)token * rows + row] = rounded(sum);
    }
}
