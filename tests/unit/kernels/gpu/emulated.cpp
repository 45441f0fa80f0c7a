// Runs the kernel on a CPU, block after block.
#include "emulated.h"
#include "sparse_mma.cu"

static void each_block(int blocks_x, int blocks_y, auto kernel) {
    for (int by = 0; by < blocks_y; by++)
        for (int bx = 0; bx < blocks_x; bx++) {
            block_barrier = std::make_unique<std::barrier<>>(32 * WARPS);
            for (auto& warp : warp_barrier) warp = std::make_unique<std::barrier<>>(32);
            std::vector<std::thread> lanes;
            for (int t = 0; t < 32 * WARPS; t++)
                lanes.emplace_back([=] {
                    threadIdx = {t % 32, t / 32};
                    blockIdx = {bx, by};
                    gridDim = {blocks_x, blocks_y};
                    kernel();
                });
            for (auto& lane : lanes) lane.join();
        }
}

#ifdef EXPAND
extern "C" void run(
    const Four* packed, const float* scales, u16* out, int rows, int columns, int tiles, int groups, int blocks_x,
    int blocks_y
) {
    each_block(blocks_x, blocks_y, [=] { expand(packed, scales, out, rows, columns, tiles, groups); });
}
#else
extern "C" void run(
    const Four* packed, const u16* x, const float* scales, const u16* bias, u16* out, int tokens, int rows, int columns,
    int tiles, int groups, int blocks_x, int blocks_y
) {
    each_block(blocks_x, blocks_y, [=] {
        sparse_mma(packed, x, scales, bias, out, tokens, rows, columns, tiles, groups);
    });
}
#endif
