/* How fast this machine reads memory: what a decode kernel is measured against. */
#include <stddef.h>
#include <stdint.h>

/* Exclusive or of `words` 64-bit words, a multiple of 8, read once from end to end by all threads. */
uint64_t stream_read(const uint64_t *from, int64_t words) {
    uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(^ : total)
    for (int64_t part = 0; part < words; part += 1 << 15) { /* 256 KiB: a thread's share is one sequential stream */
        uint64_t sums[8] = {0};
        int64_t end = part + (1 << 15) < words ? part + (1 << 15) : words;
        for (int64_t i = part; i < end; i += 8) {
            __builtin_prefetch((const char *)(from + i) + 8192, 0, 2); /* the best of those tried */
            for (int j = 0; j < 8; j++) sums[j] ^= from[i + j];
        }
        for (int j = 0; j < 8; j++) total ^= sums[j];
    }
    return total;
}
