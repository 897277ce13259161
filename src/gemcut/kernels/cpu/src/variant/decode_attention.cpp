// Computes: attention of one new token of each sequence over the paged cache; rotation and cache write are inside
// Shapes: qkv bf16 [sequences, (heads + 2 kv_heads) head_dim]; cache bf16 [slots, kv_heads, head_dim]; out as queries
// Runs: gemcut/kernels/cpu/attention.py and stack.cpp; threads by (pairs of) query heads
// Schedule: flash-decoding's split by heads, over a paged cache (arXiv 2309.06180); softmax in two passes
// Invariants: a head's sums have the same order whatever the threads and the number of heads read together
#include <math.h>

#include "attention.h"
#include "pool.h"
#include "scratch.h"
#include "vector_math.h"

namespace {

constexpr int64_t MAX_HEAD_DIM = 512;

// Values that load_pairs takes at once.
constexpr int64_t PAIRS = 2 * W;
// Of them, how many of each head's result are kept in registers while rows of values pass.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int KEPT = 4;
#else
constexpr int KEPT = 2;
#endif
// Keys whose scores are summed side by side.
constexpr int KEYS = 4;

// Into L2: in L1 the rows of one head would fall on a quarter of the sets, and push out the rows in use.
inline void fetch(const uint16_t* row, int64_t n) {
    for (int64_t j = 0; j < n; j += 32) __builtin_prefetch(row + j, 0, 2);
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

// What load_pairs makes of neighbours, the even ones first; a rest below PAIRS stays as it is.
void to_pairs(const float* from, int64_t n, float* to) {
    const int64_t whole = n / PAIRS * PAIRS;
    for (int64_t start = 0; start < whole; start += PAIRS)
        for (int64_t i = 0; i < W; ++i) {
            to[start + i] = from[start + 2 * i];
            to[start + W + i] = from[start + 2 * i + 1];
        }
    for (int64_t j = whole; j < n; ++j) to[j] = from[j];
}

void from_pairs(const float* from, int64_t n, float* to) {
    const int64_t whole = n / PAIRS * PAIRS;
    for (int64_t start = 0; start < whole; start += PAIRS)
        for (int64_t i = 0; i < W; ++i) {
            to[start + 2 * i] = from[start + i];
            to[start + 2 * i + 1] = from[start + W + i];
        }
    for (int64_t j = whole; j < n; ++j) to[j] = from[j];
}

typedef float Head[MAX_HEAD_DIM];

// Scores of K keys, `stride` apart, with G queries. Each is summed in the same order whatever K and G are.
template <int K, int G>
inline void score(const uint16_t* keys, int64_t stride, const Head* queries, int64_t n, float* const* out) {
    Vector total[K][G];
    for (int k = 0; k < K; ++k)
        for (int g = 0; g < G; ++g) total[k][g] = zero();
    const int64_t whole = n / PAIRS * PAIRS;
    for (int64_t j = 0; j < whole; j += PAIRS)
        for (int k = 0; k < K; ++k) {
            Vector even, odd;
            load_pairs(keys + k * stride + j, even, odd);
            for (int g = 0; g < G; ++g) {
                total[k][g] = fma(even, load(queries[g] + j), total[k][g]);
                total[k][g] = fma(odd, load(queries[g] + j + W), total[k][g]);
            }
        }
    for (int k = 0; k < K; ++k)
        for (int g = 0; g < G; ++g) {
            float result = sum(total[k][g]);
            for (int64_t j = whole; j < n; ++j) result += from_bf16(keys[k * stride + j]) * queries[g][j];
            out[g][k] = result;
        }
}

// results += weights * values: C times PAIRS columns of `count` rows, `stride` apart. Asks for those columns of `next`.
template <int C, int G>
inline void add_values(const uint16_t* values, const uint16_t* next, int64_t stride, int64_t count,
                       const float* const* weights, float* const* results) {
    Vector total[G][2 * C];
    for (int g = 0; g < G; ++g)
        for (int c = 0; c < 2 * C; ++c) total[g][c] = load(results[g] + c * W);
    for (int64_t i = 0; i < count; ++i) {
        if (next != nullptr) fetch(next + i * stride, C * PAIRS);
        for (int c = 0; c < C; ++c) {
            Vector even, odd;
            load_pairs(values + i * stride + c * PAIRS, even, odd);
            for (int g = 0; g < G; ++g) {
                const Vector weight = broadcast<1>(weights[g] + i);
                total[g][2 * c] = fma(weight, even, total[g][2 * c]);
                total[g][2 * c + 1] = fma(weight, odd, total[g][2 * c + 1]);
            }
        }
    }
    for (int g = 0; g < G; ++g)
        for (int c = 0; c < 2 * C; ++c) store(results[g] + c * W, total[g][c]);
}

// scores = softmax(soft-capped scores) without the division; returns what to divide by.
float softmax_numerators(float* scores, int64_t count, float softcap) {
    if (softcap > 0)
        for (int64_t i = 0; i < count; ++i) scores[i] = softcap * tanh_fp32(scores[i] / softcap);
    float largest[W], weights[W] = {};
    for (int l = 0; l < W; ++l) largest[l] = scores[0];
    const int64_t whole = count / W * W;
    for (int64_t i = 0; i < whole; i += W)
        for (int l = 0; l < W; ++l) largest[l] = scores[i + l] > largest[l] ? scores[i + l] : largest[l];
    for (int64_t i = whole; i < count; ++i) largest[0] = scores[i] > largest[0] ? scores[i] : largest[0];
    for (int l = 1; l < W; ++l) largest[0] = largest[l] > largest[0] ? largest[l] : largest[0];
    for (int64_t i = 0; i < count; ++i) scores[i] = exp_fp32(scores[i] - largest[0]);
    for (int64_t i = 0; i < whole; i += W)
        for (int l = 0; l < W; ++l) weights[l] += scores[i + l];
    float total = 0;
    for (int l = 0; l < W; ++l) total += weights[l];
    for (int64_t i = whole; i < count; ++i) total += scores[i];
    return total;
}

// Calls f(row, next, i, count) for each cache block of the keys first <= i < length: `row` is where the first of its keys
// begins, `next` that of the block after it (null after the last).
template <typename F>
inline void each_block(const AttentionCall& call, const uint16_t* storage, const int64_t* blocks, int64_t first,
                     int64_t length, F f) {
    const int64_t stride = call.kv_heads * call.head_dim, size = call.block_size;
    for (int64_t i = first; i < length;) {
        const int64_t block = i / size, border = (block + 1) * size, end = border < length ? border : length;
        const uint16_t* next = border < length ? storage + blocks[block + 1] * size * stride : nullptr;
        f(storage + (blocks[block] * size + i % size) * stride, next, i, end - i);
        i = end;
    }
}

// G neighbouring query heads of one sequence that share a key head: keys and values are read once for all.
template <int G>
void attend(const AttentionCall& call, int64_t sequence, int64_t head) {
    const int64_t n = call.head_dim, row = (call.heads + 2 * call.kv_heads) * n, stride = call.kv_heads * n;
    const int64_t kv_head = head / (call.heads / call.kv_heads), length = call.lengths[sequence];
    const int64_t first = call.window > 0 && length > call.window ? length - call.window : 0, count = length - first;
    const int64_t* blocks = call.blocks + sequence * call.blocks_stride;
    float* memory = static_cast<float*>(scratch(size_t(count) * G * sizeof(float)));
    alignas(64) Head queries[G], results[G], plain;
    float weights[G];
    for (int g = 0; g < G; ++g) {
        rotate_head(call, call.qkv + sequence * row + (head + g) * n, call.q_norm, sequence, call.scale, plain);
        to_pairs(plain, n, queries[g]);
        memset(results[g], 0, size_t(n) * sizeof(float));
    }
    // Blocks lie anywhere, and their rows apart: the hardware prefetcher does not foresee them, so they are prefetched here.
    each_block(call, call.keys + kv_head * n, blocks, first, length,
             [&](const uint16_t* keys, const uint16_t* next, int64_t i, int64_t rows) {
                 for (int64_t r = 0; r < rows;) {
                     const int many = r + KEYS <= rows ? KEYS : 1;
                     for (int k = 0; k < many && next != nullptr; ++k) fetch(next + (r + k) * stride, n);
                     float* out[G];
                     for (int g = 0; g < G; ++g) out[g] = memory + g * count + i + r - first;
                     if (many == KEYS) score<KEYS, G>(keys + r * stride, stride, queries, n, out);
                     else score<1, G>(keys + r * stride, stride, queries, n, out);
                     r += many;
                 }
             });
    for (int g = 0; g < G; ++g) weights[g] = softmax_numerators(memory + g * count, count, call.softcap);
    each_block(call, call.values + kv_head * n, blocks, first, length,
             [&](const uint16_t* values, const uint16_t* next, int64_t i, int64_t rows) {
                 const float* of_keys[G];
                 float* to[G];
                 for (int g = 0; g < G; ++g) of_keys[g] = memory + g * count + i - first;
                 int64_t j = 0;
                 for (int64_t columns; j + PAIRS <= n; j += columns) {
                     columns = j + KEPT * PAIRS <= n ? KEPT * PAIRS : PAIRS;
                     const uint16_t* ahead = next == nullptr ? nullptr : next + j;
                     for (int g = 0; g < G; ++g) to[g] = results[g] + j;
                     if (columns == PAIRS) add_values<1, G>(values + j, ahead, stride, rows, of_keys, to);
                     else add_values<KEPT, G>(values + j, ahead, stride, rows, of_keys, to);
                 }
                 for (; j < n; ++j)
                     for (int g = 0; g < G; ++g)
                         for (int64_t r = 0; r < rows; ++r)
                             results[g][j] += of_keys[g][r] * from_bf16(values[r * stride + j]);
             });
    for (int g = 0; g < G; ++g) {
        from_pairs(results[g], n, plain);
        uint16_t* out = call.out + (sequence * call.heads + head + g) * n;
        for (int64_t j = 0; j < n; ++j) out[j] = to_bf16(plain[j] / weights[g]);
    }
}

// Items are G neighbouring query heads of a sequence.
template <int G>
void attend_heads(void* context, int64_t begin, int64_t end, int) {
    const AttentionCall& call = *static_cast<const AttentionCall*>(context);
    for (int64_t item = begin * G; item < end * G; item += G) attend<G>(call, item / call.heads, item % call.heads);
}

}  // namespace

GEMCUT_ENTRY(void, attend_one)(const AttentionCall* call, int threads) {
    void* context = const_cast<AttentionCall*>(call);
    write_heads(context, 0, call->sequences * call->kv_heads, 0);
    const int64_t heads = call->sequences * call->heads;
    // Two heads read their keys once, if that leaves enough for all threads.
    const bool in_pairs = call->heads / call->kv_heads % 2 == 0 && heads / 2 >= threads;
    gemcut_parallel(in_pairs ? attend_heads<2> : attend_heads<1>, context, in_pairs ? heads / 2 : heads, 1, threads);
}
