// Memory of the calling thread, kept for its next call in the same file and variant, and freed with it.
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
