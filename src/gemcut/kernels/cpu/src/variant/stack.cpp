// Computes: all layers of a network for sequences of one new token each, in one call
// Shapes: residual fp32 [rows, d], in place; the layers' tensors in struct Stack
// Runs: gemcut/model/ops/cpu_stack.py, once a decode step
// Schedule: the other kernels one after another: no interpreter runs between them, and the pool stays awake
// Invariants: the same kernels, so the same bits, as calling them one by one
#include "attention.h"
#include "linear.h"

// GEMV of a few rows (linear.cpp) and GEMM of many (gemm.cpp).
typedef void (*FewRows)(const Plan* plan, const void* x, int64_t m, int64_t x_stride, int x_is_bf16, void* out,
                        int64_t out_stride, int threads);
typedef void (*ManyRows)(const Plan* plan, const uint16_t* x, int64_t m, int64_t x_stride, void* out,
                         int64_t out_stride, int threads);

// gemcut/model/ops/cpu_stack.py mirrors these.
struct Group {  // what layers of one kind, full or sliding, share in a step
    const float *cos, *sin;
    const int64_t *slots, *blocks, *lengths;
    int64_t rotation_stride, blocks_stride;
};

struct Layer {
    const Plan *qkv, *o, *gate_up, *down;
    const float *post_attention, *pre_feedforward, *post_feedforward;
    const float* following;  // the next layer's first norm; null after the last
    const float *q_norm, *k_norm;
    uint16_t *keys, *values;
    int64_t group, window;
    float scale, softcap;
};

struct Stack {
    const Layer* layers;
    Group groups[2];
    const float* first_norm;
    FewRows few;
    ManyRows many;  // may be null
    // Scratch, [rows, width of each]; qkv holds heads and key heads, gate_up twice `width`.
    uint16_t *x, *qkv, *mixed, *gate_up, *activated;
    int64_t count, few_rows, d, heads, kv_heads, head_dim, block_size, width;
    float eps;
};

GEMCUT_ENTRY(void, add_norm)
(float* residual, const uint16_t* added, int64_t added_stride, const float* added_scale, const float* scale, float eps,
 int64_t rows, int64_t d, uint16_t* out, int threads);
GEMCUT_ENTRY(void, geglu)(const uint16_t* gate_up, uint16_t* out, int64_t rows, int64_t width, int threads);
GEMCUT_ENTRY(void, attend_one)(const AttentionCall* call, int threads);

#define OF_VARIANT(name) GEMCUT_JOIN(gemcut_, name, GEMCUT_VARIANT)

// residual fp32 [rows, d] goes through all layers, in place.
GEMCUT_ENTRY(void, stack)(const Stack* stack, float* residual, int64_t rows, int threads) {
    const Stack& s = *stack;
    auto linear = [&](const Plan* plan, const uint16_t* x, uint16_t* out, int64_t columns) {
        if (rows > s.few_rows) s.many(plan, x, rows, plan->k, out, columns, threads);
        else s.few(plan, x, rows, plan->k, 1, out, columns, threads);
    };
    const int64_t heads = s.heads * s.head_dim, key_heads = s.kv_heads * s.head_dim;
    OF_VARIANT(add_norm)(residual, nullptr, 0, nullptr, s.first_norm, s.eps, rows, s.d, s.x, threads);
    for (int64_t i = 0; i < s.count; ++i) {
        const Layer& layer = s.layers[i];
        const Group& group = s.groups[layer.group];
        linear(layer.qkv, s.x, s.qkv, heads + 2 * key_heads);
        AttentionCall call;
        call.qkv = s.qkv, call.cos = group.cos, call.sin = group.sin;
        call.q_norm = layer.q_norm, call.k_norm = layer.k_norm;
        call.keys = layer.keys, call.values = layer.values;
        call.slots = group.slots, call.blocks = group.blocks, call.lengths = group.lengths, call.out = s.mixed;
        call.sequences = rows, call.heads = s.heads, call.kv_heads = s.kv_heads, call.head_dim = s.head_dim;
        call.rotation_stride = group.rotation_stride, call.blocks_stride = group.blocks_stride;
        call.block_size = s.block_size, call.window = layer.window;
        call.scale = layer.scale, call.eps = s.eps, call.softcap = layer.softcap;
        OF_VARIANT(attend_one)(&call, threads);
        linear(layer.o, s.mixed, s.x, s.d);
        OF_VARIANT(add_norm)
        (residual, s.x, s.d, layer.post_attention, layer.pre_feedforward, s.eps, rows, s.d, s.x, threads);
        linear(layer.gate_up, s.x, s.gate_up, 2 * s.width);
        OF_VARIANT(geglu)(s.gate_up, s.activated, rows, s.width, threads);
        linear(layer.down, s.activated, s.x, s.d);
        OF_VARIANT(add_norm)
        (residual, s.x, s.d, layer.post_feedforward, layer.following, s.eps, rows, s.d,
         layer.following == nullptr ? nullptr : s.x, threads);
    }
}
