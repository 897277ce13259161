// Attention of one query a sequence over the paged cache, from the fused q, k, v of the projection to the heads' results:
// norms of queries and keys, rotation, the write of key and value, scores, soft-cap, softmax, the weighted sum.
#include <math.h>
#include <stdlib.h>

#include "attention.h"
#include "pool.h"
#include "step.h"

namespace {

constexpr int64_t MAX_HEAD_DIM = 512;

// Rows of keys or values that are on their way while one is being used: about 4 KB.
constexpr int64_t AHEAD = 8;

inline void fetch(const uint16_t* row, int64_t n) {
    for (int64_t j = 0; j < n; j += 32) __builtin_prefetch(row + j);
}

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

// A head of `from`: normalised if there is a norm, rotated, multiplied by `scale`.
void rotate_head(const AttentionCall& call, const uint16_t* from, const float* norm, int64_t sequence, float scale,
                 float* to) {
    const int64_t n = call.head_dim, half = n / 2;
    float x[MAX_HEAD_DIM];
    for (int64_t j = 0; j < n; ++j) x[j] = from_bf16(from[j]);
    if (norm != nullptr) {
        float squares = 0;
        for (int64_t j = 0; j < n; ++j) squares += x[j] * x[j];
        const float factor = 1.0f / sqrtf(squares / float(n) + call.eps);
        for (int64_t j = 0; j < n; ++j) x[j] = x[j] * factor * norm[j];
    }
    const float* cos = call.cos + sequence * call.rotation_stride;
    const float* sin = call.sin + sequence * call.rotation_stride;
    for (int64_t j = 0; j < half; ++j) {
        to[j] = (x[j] * cos[j] - x[j + half] * sin[j]) * scale;
        to[j + half] = (x[j + half] * cos[j] + x[j] * sin[j]) * scale;
    }
}

// Items are pairs of a sequence and a key head.
void write_heads(void* context, int64_t begin, int64_t end, int) {
    const AttentionCall& call = *static_cast<const AttentionCall*>(context);
    const int64_t n = call.head_dim, row = (call.heads + 2 * call.kv_heads) * n;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t sequence = item / call.kv_heads, head = item % call.kv_heads;
        const uint16_t* key = call.qkv + sequence * row + (call.heads + head) * n;
        const int64_t place = (call.slots[sequence] * call.kv_heads + head) * n;
        float rotated[MAX_HEAD_DIM];
        rotate_head(call, key, call.k_norm, sequence, 1.0f, rotated);
        for (int64_t j = 0; j < n; ++j) call.keys[place + j] = to_bf16(rotated[j]);
        memcpy(call.values + place, key + call.kv_heads * n, size_t(n) * 2);
    }
}

// Items are pairs of a sequence and a query head.
void attend_heads(void* context, int64_t begin, int64_t end, int) {
    const AttentionCall& call = *static_cast<const AttentionCall*>(context);
    const int64_t n = call.head_dim, row = (call.heads + 2 * call.kv_heads) * n, group = call.heads / call.kv_heads;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t sequence = item / call.heads, head = item % call.heads, kv_head = head / group;
        const int64_t length = call.lengths[sequence];
        const int64_t first = call.window > 0 && length > call.window ? length - call.window : 0;
        const int64_t* blocks = call.blocks + sequence * call.blocks_stride;
        float* scores = scratch(size_t(length));
        alignas(64) float query[MAX_HEAD_DIM];
        rotate_head(call, call.qkv + sequence * row + head * n, call.q_norm, sequence, call.scale, query);
        const int64_t stride = call.kv_heads * n, size = call.block_size;
        // Rows lie 16 to a block and blocks anywhere: the processor does not foresee them, so they are asked for.
        auto row_of = [&](const uint16_t* storage, int64_t i) {
            return storage + (blocks[i / size] * size + i % size) * stride + kv_head * n;
        };
        for (int64_t i = first; i < first + AHEAD && i < length; ++i) fetch(row_of(call.keys, i), n);
        for (int64_t i = first; i < length; ++i) {
            if (i + AHEAD < length) fetch(row_of(call.keys, i + AHEAD), n);
            const uint16_t* key = row_of(call.keys, i);
            Vector total[4] = {zero(), zero(), zero(), zero()};
            int64_t j = 0;
            for (; j + 4 * W <= n; j += 4 * W)
                for (int v = 0; v < 4; ++v) total[v] = fma(load(key + j + v * W), load(query + j + v * W), total[v]);
            float score = sum((total[0] + total[1]) + (total[2] + total[3]));
            for (; j < n; ++j) score += from_bf16(key[j]) * query[j];
            scores[i] = score;
        }
        if (call.softcap > 0)
            for (int64_t i = first; i < length; ++i) scores[i] = call.softcap * tanh_fp32(scores[i] / call.softcap);
        float largest = scores[first];
        for (int64_t i = first; i < length; ++i) largest = scores[i] > largest ? scores[i] : largest;
        for (int64_t i = first; i < length; ++i) scores[i] = exp_fp32(scores[i] - largest);
        float weights = 0;
        for (int64_t i = first; i < length; ++i) weights += scores[i];
        alignas(64) float result[MAX_HEAD_DIM];
        for (int64_t j = 0; j < n; ++j) result[j] = 0;
        for (int64_t i = first; i < first + AHEAD && i < length; ++i) fetch(row_of(call.values, i), n);
        for (int64_t i = first; i < length; ++i) {
            if (i + AHEAD < length) fetch(row_of(call.values, i + AHEAD), n);
            const uint16_t* value = row_of(call.values, i);
            const float weight = scores[i];
            for (int64_t j = 0; j < n; ++j) result[j] += weight * from_bf16(value[j]);
        }
        uint16_t* out = call.out + (sequence * call.heads + head) * n;
        for (int64_t j = 0; j < n; ++j) out[j] = to_bf16(result[j] / weights);
    }
}

}  // namespace

GEMCUT_ENTRY(void, attend_one)(const AttentionCall* call, int threads) {
    void* context = const_cast<AttentionCall*>(call);
    write_heads(context, 0, call->sequences * call->kv_heads, 0);
    gemcut_parallel(attend_heads, context, call->sequences * call->heads, 1, threads);
}
