// Computes: the arguments of decode_attention.cpp's attend_one
// Shapes: see the fields; sequences of one new token each, heads of head_dim values
// Runs: filled by stack.cpp, and by gemcut/kernels/cpu/attention.py, which mirrors the struct
// Schedule: none: a declaration
// Invariants: pointers live until the call returns; window 0: the whole context; softcap 0: none
#pragma once
#include "gemcut.h"

// gemcut/kernels/cpu/attention.py mirrors it.
struct AttentionCall {
    const uint16_t* qkv;    // bf16 [sequences, (heads + 2 kv_heads) head_dim], contiguous
    const float *cos, *sin; // fp32 [sequences, head_dim / 2], rows rotation_stride apart
    const float *q_norm, *k_norm;  // fp32 [head_dim], or null
    uint16_t *keys, *values;       // bf16 [slots, kv_heads, head_dim]: a layer's storage
    const int64_t* slots;   // [sequences]: where the new key and value go
    const int64_t* blocks;  // [sequences, blocks_stride]: a sequence's live blocks
    const int64_t* lengths; // [sequences]: keys in those blocks, the new one included
    uint16_t* out;          // bf16 [sequences, heads head_dim]
    int64_t sequences, heads, kv_heads, head_dim, rotation_stride, blocks_stride, block_size;
    int64_t window;         // 0: the whole context
    float scale, eps, softcap;  // softcap 0: none
};
