// Computes: RMSNorm with the residual sum, GeGLU, and the soft-cap
// Shapes: residual fp32 [rows, d]; other rows bf16; logits fp32
// Runs: gemcut/kernels/cpu/rowwise.py and stack.cpp; threads by rows or chunks of a row
// Schedule: rowwise reduction and elementwise, vectorized
// Invariants: fp32, rounded to bf16 once where a result is stored as bf16
#include <math.h>

#include "pool.h"
#include "scratch.h"
#include "vector_math.h"

namespace {

// 1 / sqrt(mean of squares + eps).
float inverse_rms(const float* x, int64_t n, float eps) {
    Vector total[4] = {zero(), zero(), zero(), zero()};
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        for (int i = 0; i < 4; ++i) total[i] = fma(load(x + j + i * W), load(x + j + i * W), total[i]);
    float squares = (sum(total[0]) + sum(total[1])) + (sum(total[2]) + sum(total[3]));
    for (; j < n; ++j) squares += x[j] * x[j];
    return 1.0f / sqrtf(squares / float(n) + eps);
}

struct Norm {
    float* residual;
    const uint16_t* added;
    const float *added_scale, *scale;
    float eps;
    int64_t d, added_stride;
    uint16_t* out;
};

void norm_rows(void* context, int64_t begin, int64_t end, int) {
    const Norm& call = *static_cast<const Norm*>(context);
    const int64_t d = call.d;
    float* wide = static_cast<float*>(scratch(size_t(d) * sizeof(float)));
    for (int64_t row = begin; row < end; ++row) {
        float* residual = call.residual + row * d;
        if (call.added != nullptr) {
            const uint16_t* added = call.added + row * call.added_stride;
            for (int64_t j = 0; j < d; ++j) wide[j] = from_bf16(added[j]);
            const float factor = inverse_rms(wide, d, call.eps);
            for (int64_t j = 0; j < d; ++j) residual[j] += wide[j] * factor * call.added_scale[j];
        }
        if (call.out == nullptr) continue;
        const float factor = inverse_rms(residual, d, call.eps);
        uint16_t* out = call.out + row * d;
        for (int64_t j = 0; j < d; ++j) out[j] = to_bf16(residual[j] * factor * call.scale[j]);
    }
}

struct Geglu {
    const uint16_t* gate_up;
    uint16_t* out;
    int64_t width;
};

constexpr int64_t GEGLU_CHUNK = 1024;

void geglu_chunks(void* context, int64_t begin, int64_t end, int) {
    const Geglu& call = *static_cast<const Geglu*>(context);
    const int64_t chunks = (call.width + GEGLU_CHUNK - 1) / GEGLU_CHUNK;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t row = p / chunks, first = p % chunks * GEGLU_CHUNK;
        const int64_t last = first + GEGLU_CHUNK < call.width ? first + GEGLU_CHUNK : call.width;
        const uint16_t* gate = call.gate_up + row * 2 * call.width;
        const uint16_t* up = gate + call.width;
        uint16_t* out = call.out + row * call.width;
        for (int64_t j = first; j < last; ++j) out[j] = to_bf16(gelu_fp32(from_bf16(gate[j])) * from_bf16(up[j]));
    }
}

struct SoftCap {
    float* values;
    float cap;
};

void cap_values(void* context, int64_t begin, int64_t end, int) {
    const SoftCap& call = *static_cast<const SoftCap*>(context);
    for (int64_t j = begin; j < end; ++j) {
        const float value = call.values[j];
        call.values[j] = call.cap * tanh_fp32(value / call.cap) + (value - value);
    }
}

}  // namespace

// A row of the residual stream, fp32 [rows, d]: `added` (bf16, null: nothing) is normalised, multiplied by added_scale
// and added; then out (bf16 [rows, d], null: nothing) is the residual normalised and multiplied by scale.
GEMCUT_ENTRY(void, add_norm)
(float* residual, const uint16_t* added, int64_t added_stride, const float* added_scale, const float* scale, float eps,
 int64_t rows, int64_t d, uint16_t* out, int threads) {
    Norm call{residual, added, added_scale, scale, eps, d, added_stride, out};
    gemcut_parallel(norm_rows, &call, rows, 1 + 16384 / d, threads);
}

// out[rows, width] = gelu(gate) * up, where gate_up [rows, 2 width] is contiguous; bf16.
GEMCUT_ENTRY(void, geglu)(const uint16_t* gate_up, uint16_t* out, int64_t rows, int64_t width, int threads) {
    Geglu call{gate_up, out, width};
    gemcut_parallel(geglu_chunks, &call, rows * ((width + GEGLU_CHUNK - 1) / GEGLU_CHUNK), 4, threads);
}

// values = cap * tanh(values / cap), fp32; NaN of an infinite one, which would pass for a logit as +-cap (inf - inf is NaN).
GEMCUT_ENTRY(void, softcap)(float* values, int64_t count, float cap, int threads) {
    SoftCap call{values, cap};
    gemcut_parallel(cap_values, &call, count, 16384, threads);
}
