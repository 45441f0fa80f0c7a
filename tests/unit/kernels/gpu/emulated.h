// What sparse_mma.cu needs of a GPU, on a CPU: one thread a lane, and mma.sp as the PTX ISA describes it.
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#ifdef EXPAND
#define WARPS 8
#endif
#define DEVICE static inline
#define __global__
#define __launch_bounds__(n)
#define __shared__ static

typedef unsigned int u32;
typedef unsigned short u16;
struct alignas(16) Four { u32 a[4]; };
struct Index { int x, y; };

static thread_local Index threadIdx, blockIdx, gridDim;
static Four staged[1 << 14];
static std::unique_ptr<std::barrier<>> block_barrier, warp_barrier[WARPS];
static u32 shown[WARPS][32][16];

static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void meet() { warp_barrier[threadIdx.y]->arrive_and_wait(); }

DEVICE Four load_weight(const Four* at) { return *at; }
DEVICE Four load_x(const u16* at) { Four v; memcpy(&v, at, 16); return v; }

DEVICE u32 from_neighbour(u32 value) {
    auto& warp = shown[threadIdx.y];
    warp[threadIdx.x][0] = value;
    meet();
    u32 got = warp[threadIdx.x ^ 1][0];
    meet();
    return got;
}

DEVICE float as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
DEVICE u32 as_bits(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }

DEVICE float widened(u16 number) {
#if HALF
    _Float16 half; memcpy(&half, &number, 2); return (float)half;
#else
    return as_float((u32)number << 16);
#endif
}

DEVICE u16 rounded(float number) {
#if HALF
    _Float16 half = (_Float16)number; u16 bits; memcpy(&bits, &half, 2); return bits;
#else
    u32 bits = as_bits(number);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int s = 0; s < 32; s += 16)
        result |= (u32)rounded(fmaf(widened(a >> s), widened(b >> s), widened(c >> s))) << s;
    return result;
}

template <int SELECTOR>
static void mma_sp(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 positions) {
    auto& warp = shown[threadIdx.y];
    u32* mine = warp[threadIdx.x];
    for (int i = 0; i < 4; i++) { mine[i] = a[i]; mine[4 + i] = b[i]; }
    mine[8] = positions;
    meet();
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, token = 2 * q + i % 2;
        double sum = d[i];
        for (int j = 0; j < 16; j++) {  // kept values of the row
            const u32 pair = warp[row % 8 * 4 + j % 8 / 2][row / 8 + j / 8 * 2];
            const int group = j / 2;
            const u32 word = warp[row % 8 * 4 + 2 * SELECTOR + group / 4][8];
            const int index = word >> (row / 8 * 16 + group % 4 * 4 + j % 2 * 2) & 3;
            const int k = 4 * group + index;
            const u32 x = warp[token * 4 + k % 8 / 2][4 + k / 8];
            sum += (double)widened(pair >> (j % 2 * 16)) * widened(x >> (k % 2 * 16));
        }
        d[i] = (float)sum;
    }
    meet();
}
