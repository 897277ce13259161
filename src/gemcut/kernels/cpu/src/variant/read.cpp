// Computes: the exclusive or of a stretch of memory: reads it and does nothing else
// Shapes: `size` bytes, a multiple of 64
// Runs: benchmarks/cpu_kernels.py, as what a GEMV's bandwidth is compared with; threads by 64-byte lines
// Schedule: streaming read
// Invariants: every byte is read once
#include "pool.h"

namespace {

struct Reading {
    const uint8_t* data;
    uint64_t seen;
};

void read(void* context, int64_t begin, int64_t end, int) {
    Reading& reading = *static_cast<Reading*>(context);
    const uint64_t* words = reinterpret_cast<const uint64_t*>(reading.data);
    uint64_t sum = 0;
    for (int64_t i = begin * 8; i < end * 8; ++i) {
        sum ^= words[i];
    }
    __atomic_fetch_xor(&reading.seen, sum, __ATOMIC_RELAXED);
}

}  // namespace

// The exclusive or of the 64-bit words of `size` bytes, a multiple of 64.
GEMCUT_ENTRY(uint64_t, read)(const void* data, int64_t size, int threads) {
    Reading reading{static_cast<const uint8_t*>(data), 0};
    gemcut_parallel(read, &reading, size / 64, 4096, threads);
    return reading.seen;
}
