// Computes: memory of the calling thread, kept for its next call in the same file and variant
// Shapes: at least `size` bytes, aligned to 64
// Runs: linear.cpp, rowwise.cpp and decode_attention.cpp
// Schedule: none: one growing block a thread
// Invariants: uninitialised; freed with the thread
#pragma once
#include <stddef.h>
#include <stdlib.h>

namespace {

struct Scratch {
    void* memory;
    size_t size;
    ~Scratch() { free(memory); }
};

void* scratch(size_t size) {
    static thread_local Scratch kept{nullptr, 0};
    if (kept.size < size) {
        free(kept.memory);
        if (posix_memalign(&kept.memory, 64, size)) abort();
        kept.size = size;
    }
    return kept.memory;
}

}  // namespace
