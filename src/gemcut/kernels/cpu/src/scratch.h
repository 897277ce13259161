// Memory of the calling thread for fp32 values, kept for its next call in the same file.
#pragma once
#include <stddef.h>
#include <stdlib.h>

namespace {

struct Scratch {
    float* memory;
    size_t size;
    ~Scratch() { free(memory); }
};

float* scratch(size_t count) {
    static thread_local Scratch kept{nullptr, 0};
    if (kept.size < count) {
        free(kept.memory);
        void* fresh;
        if (posix_memalign(&fresh, 64, count * sizeof(float))) abort();
        kept.memory = static_cast<float*>(fresh), kept.size = count;
    }
    return kept.memory;
}

}  // namespace
