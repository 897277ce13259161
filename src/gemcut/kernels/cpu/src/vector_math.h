// Computes: exp, tanh and gelu of fp32 in plain arithmetic that compilers turn into vector code
// Shapes: one value in, one out
// Runs: rowwise.cpp and decode_attention.cpp, inside loops that are vectorized
// Schedule: range reduction and a polynomial (Cephes' expf), no branches
// Invariants: errors as said beside each function; NaN stays NaN
#pragma once
#include "simd.h"

namespace {

// e^x within 2 ulp for -87 <= x <= 88; 0 below (e^-87 is 1.6e-38); x above 88 is taken as 88; NaN stays NaN.
inline float exp_fp32(float x) {
    const float below = x < -87.0f ? 0.0f : 1.0f;
    // Written so that NaN passes through both.
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    // x = n log 2 + r. Adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the lower bits.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = int32_t(uint32_t(bits - 0x4b400000 + 127) << 23);
    float power;
    memcpy(&power, &bits, 4);
    return p * power * below;
}

// tanh within 1e-7 or, near zero, 3 ulp; odd; +-1 far out; NaN stays NaN.
inline float tanh_fp32(float x) {
    const float a = x < 0 ? -x : x;
    const float e = exp_fp32(-2.0f * a);
    const float far = (1.0f - e) / (1.0f + e);
    // Near zero the difference loses digits: the odd Taylor series to x^9.
    const float s = x * x;
    const float near =
        a * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
    const float value = a < 0.2f ? near : far;
    return x < 0 ? -value : value;
}

// gelu(x) = x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form, written without tanh.
inline float gelu_fp32(float x) {
    const float u = 0.797884561f * (x + 0.044715f * (x * x * x));
    const float value = x / (1.0f + exp_fp32(-2.0f * u));
    // Further out the result is below fp32's normal numbers, and the exponential would be beyond its largest.
    return x < -10.5f ? -0.0f : value;
}

}  // namespace
