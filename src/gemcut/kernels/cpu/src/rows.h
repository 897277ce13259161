// Computes: inner products of R rows of packed weights with M rows of x, in each arithmetic an instruction set has
// Shapes: weights: R rows of k codes; x: M rows (struct Input); out fp32 [R, MAX_M]
// Runs: one thread for a group of rows, in linear.cpp
// Schedule: register blocking R x M; codebook look-ups by vector permutation; weights prefetched into L2
// Invariants: each row's sum has the same order whatever R is: results do not depend on how rows are grouped
#pragma once
#include "simd.h"

namespace {

// x as the inner loops want it, all rows one after the other, each padded with zeros to a multiple of `step` values.
struct Input {
    int64_t k, step;
    const float* plain;         // [m][step]
    const float* split;         // [m][step]: within each UNIT, value e of every group of 8, for e = 0 ... 7
    const uint16_t* bf16;
    const int16_t* shorts;      // [m][step]: integers of 15 bits, within each UNIT as order_shorts says
    const float* short_scales;  // [m][step / UNIT]: what they are multiples of
    const int8_t* digits;       // [m][3][step]: x as integers of three digits to base 256, the lowest first
    const int32_t* digit_sums;  // [m][3]
    const float* digit_scale;   // [m]: what the integers are multiples of
};

// The largest magnitude; NaN and infinity count as what their bits say, above every finite value.
inline float largest_of(const float* x, int64_t count) {
    uint32_t worst = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t word;
        memcpy(&word, x + i, 4);
        word &= 0x7fffffff;
        worst = worst > word ? worst : word;
    }
    float value;
    memcpy(&value, &worst, 4);
    return value;
}

// Whether the integer arithmetic takes values of this magnitude. NaN is not in range.
inline bool in_range(float largest) { return largest <= 1e30f; }

// One UNIT of x as integers of `bits` bits and a sign, times a power of two that fits the unit's largest value. So a large
// value takes last bits from its own unit alone. False if x comes near the ends of fp32's range.
inline bool unit_to_shorts(const float* x, int bits, int16_t* shorts, float* scale) {
    const float largest = largest_of(x, UNIT);
    if (!in_range(largest)) return false;
    uint32_t word;
    memcpy(&word, &largest, 4);
    // 2 to the power that the largest value has, from its bits; values below 1e-30 become zero.
    const int exponent = largest < 1e-30f ? 0 : int(word >> 23) - 127;
    const uint32_t up = uint32_t(127 + bits - 1 - exponent) << 23, down = uint32_t(127 - bits + 1 + exponent) << 23;
    float factor;
    memcpy(&factor, &up, 4), memcpy(scale, &down, 4);
    // Adding 1.5 * 2^23 rounds to the nearest integer.
    for (int i = 0; i < UNIT; ++i) shorts[i] = int16_t(int32_t((x[i] * factor + 12582912.0f) - 12582912.0f));
    return true;
}

// Into L2: L1 has few lines in flight at once, and the loads need those.
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

// ---- fp32 arithmetic: any instruction set ------------------------------------------------------------------------

template <int R, int M, int N>
inline void four_bit_unit(const uint8_t* const* rows, const float* const* scales, const float* x, int64_t step,
                          const Codebook& codebook, Vector (&total)[R][M]) {
    for (int r = 0; r < R; ++r) {
        const Words words = load_words(rows[r]);
        Vector part[M];
        for (int m = 0; m < M; ++m) part[m] = zero();
        auto add = [&](Vector weight, int e) {
            for (int m = 0; m < M; ++m) part[m] = fma(weight, load(x + m * step + e * W), part[m]);
        };
        // The even value of a byte is in its high half.
        add(lookup<4>(codebook, words), 0), add(lookup<0>(codebook, words), 1);
        add(lookup<12>(codebook, words), 2), add(lookup<8>(codebook, words), 3);
        add(lookup<20>(codebook, words), 4), add(lookup<16>(codebook, words), 5);
        add(lookup<28>(codebook, words), 6), add(lookup<24>(codebook, words), 7);
        const Vector scale = broadcast<N>(scales[r]);
        for (int m = 0; m < M; ++m) total[r][m] = fma(scale, part[m], total[r][m]);
    }
}

// `scales`: N absmax values a unit. `ahead`: bytes from here to what will be read some microseconds later.
template <int R, int M, int N>
void four_bit_plain(const uint8_t* const* rows, const float* const* scales, const float* values, const Input& in,
                    int first, int64_t ahead, float (*out)[MAX_M]) {
    const Codebook codebook = make_codebook(values);
    const float* x = in.split + first * in.step;
    Vector total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = zero();
    const uint8_t* here[R];
    const float* scale[R];
    const int64_t units = in.k / UNIT, rest = in.k % UNIT / 2;
    for (int64_t u = 0; u < units; ++u) {
        for (int r = 0; r < R; ++r) here[r] = rows[r] + u * UNIT_BYTES, scale[r] = scales[r] + u * N;
        if (u * UNIT_BYTES % 64 == 0)
            for (int r = 0; r < R; ++r) prefetch(here[r] + ahead);
        four_bit_unit<R, M, N>(here, scale, x + u * UNIT, in.step, codebook, total);
    }
    if (rest) {
        uint8_t last[R][UNIT_BYTES] = {};
        for (int r = 0; r < R; ++r) {
            memcpy(last[r], rows[r] + units * UNIT_BYTES, rest);
            here[r] = last[r], scale[r] = scales[r] + units * N;
        }
        four_bit_unit<R, M, N>(here, scale, x + units * UNIT, in.step, codebook, total);
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[r][first + m] = sum(total[r][m]);
}

template <int R, int M, typename T>
void rows_plain(const uint8_t* const* rows, const Input& in, int first, int64_t ahead, float (*out)[MAX_M]) {
    const float* x = in.plain + first * in.step;
    Vector total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = zero();
    const int64_t whole = in.k / W * W;
    for (int64_t j = 0; j < whole; j += W) {
        for (int r = 0; r < R; ++r) {
            const T* weights = reinterpret_cast<const T*>(rows[r]) + j;
            if (j * sizeof(T) % 64 == 0) prefetch(reinterpret_cast<const uint8_t*>(weights) + ahead);
            const Vector weight = load(weights);
            for (int m = 0; m < M; ++m) total[r][m] = fma(weight, load(x + m * in.step + j), total[r][m]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
            float result = sum(total[r][m]);
            for (int64_t j = whole; j < in.k; ++j)
                result += as_float(reinterpret_cast<const T*>(rows[r])[j]) * x[m * in.step + j];
            out[r][first + m] = result;
        }
}

// ---- four-bit weights as 16-bit integers times x as 16-bit integers ------------------------------------------------

#if defined(__AVX512VNNI__)
#define GEMCUT_SHORTS 1
typedef __m512i Ints;
inline Ints load_shorts(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Vector to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints pairs(Ints a, Ints b) { return _mm512_dpwssd_epi32(_mm512_setzero_si512(), a, b); }
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
struct ShortCodebook { Ints values; };
// Twice in the register: the fifth bit of an index does not matter then, so nibbles need no masking.
inline ShortCodebook make_short_codebook(const int16_t* p) {
    return {_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// The values of a unit in the order of the four vectors: nibble 1, 0, 3, 2 of each 16-bit word.
inline void order_shorts(const int16_t* from, int16_t* to) {
    for (int e = 0; e < 4; ++e)
        for (int w = 0; w < 32; ++w) to[e * 32 + w] = from[w * 4 + e];
}
inline void dequantize_shorts(const ShortCodebook& codebook, const uint8_t* p, Ints (&out)[4]) {
    const Ints words = _mm512_loadu_si512(p);
    out[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), codebook.values);
    out[1] = _mm512_permutexvar_epi16(words, codebook.values);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), codebook.values);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), codebook.values);
}
#elif defined(__AVX2__)
#define GEMCUT_SHORTS 1
typedef __m256i Ints;
inline Ints load_shorts(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Vector to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints pairs(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
struct ShortCodebook { Ints low, high; };  // the values' bytes
inline ShortCodebook make_short_codebook(const int16_t* p) {
    alignas(16) uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) low[i] = uint8_t(p[i]), high[i] = uint8_t(p[i] >> 8);
    return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low))),
            _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)))};
}
// Even values, those of the lower then of the upper half of each 16 bytes; then odd values.
inline void order_shorts(const int16_t* from, int16_t* to) {
    for (int odd = 0; odd < 2; ++odd)
        for (int half = 0; half < 2; ++half)
            for (int lane = 0; lane < 2; ++lane)
                for (int i = 0; i < 8; ++i)
                    to[odd * 32 + half * 16 + lane * 8 + i] = from[2 * (i + lane * 16 + half * 8) + odd];
}
inline void dequantize_shorts(const ShortCodebook& codebook, const uint8_t* p, Ints (&out)[4]) {
    const Ints bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
    const Ints even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), odd = _mm256_and_si256(bytes, mask);
    const Ints even_low = _mm256_shuffle_epi8(codebook.low, even), even_high = _mm256_shuffle_epi8(codebook.high, even);
    const Ints odd_low = _mm256_shuffle_epi8(codebook.low, odd), odd_high = _mm256_shuffle_epi8(codebook.high, odd);
    out[0] = _mm256_unpacklo_epi8(even_low, even_high), out[1] = _mm256_unpackhi_epi8(even_low, even_high);
    out[2] = _mm256_unpacklo_epi8(odd_low, odd_high), out[3] = _mm256_unpackhi_epi8(odd_low, odd_high);
}
#endif

#ifdef GEMCUT_SHORTS
// Products of a codebook of 13 bits with an x of 14, of which a lane sums eight: 2^30 at most.
template <int R, int M, int N>
inline void four_bit_shorts_unit(const uint8_t* const* rows, const float* const* scales, const int16_t* x,
                                 const float* x_scale, int64_t step, const ShortCodebook& codebook, Vector (&total)[R][M]) {
    for (int r = 0; r < R; ++r) {
        Ints weights[4];
        dequantize_shorts(codebook, rows[r], weights);
        const Vector scale = broadcast<N>(scales[r]);
        for (int m = 0; m < M; ++m) {
            const int16_t* xm = x + m * step;
            Ints part = pairs(weights[0], load_shorts(xm));
            for (int e = 1; e < 4; ++e) part = add_pairs(part, weights[e], load_shorts(xm + e * (UNIT / 4)));
            total[r][m] = fma(multiply(scale, broadcast<1>(x_scale + m * (step / UNIT))), to_float(part), total[r][m]);
        }
    }
}

template <int R, int M, int N>
void four_bit_shorts(const uint8_t* const* rows, const float* const* scales, const int16_t* values, const Input& in,
                     int first, int64_t ahead, float (*out)[MAX_M]) {
    const ShortCodebook codebook = make_short_codebook(values);
    const int16_t* x = in.shorts + first * in.step;
    const float* x_scale = in.short_scales + first * (in.step / UNIT);
    Vector total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = zero();
    const uint8_t* here[R];
    const float* scale[R];
    const int64_t units = in.k / UNIT, rest = in.k % UNIT / 2;
    for (int64_t u = 0; u < units; ++u) {
        for (int r = 0; r < R; ++r) here[r] = rows[r] + u * UNIT_BYTES, scale[r] = scales[r] + u * N;
        if (UNIT_BYTES == 64 || u % 2 == 0)
            for (int r = 0; r < R; ++r) prefetch(here[r] + ahead);
        four_bit_shorts_unit<R, M, N>(here, scale, x + u * UNIT, x_scale + u, in.step, codebook, total);
    }
    if (rest) {
        uint8_t last[R][UNIT_BYTES] = {};
        for (int r = 0; r < R; ++r) {
            memcpy(last[r], rows[r] + units * UNIT_BYTES, rest);
            here[r] = last[r], scale[r] = scales[r] + units * N;
        }
        four_bit_shorts_unit<R, M, N>(here, scale, x + units * UNIT, x_scale + units, in.step, codebook, total);
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[r][first + m] = sum(total[r][m]);
}
#endif

// ---- bf16 pairs with fp32 sums ------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
#define GEMCUT_PAIRS 1

inline Vector dot(Vector sum, __m512i a, const uint16_t* b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_loadu_si512(b));
}

template <int R, int M>
void bf16_pairs(const uint8_t* const* rows, const Input& in, int first, int64_t ahead, float (*out)[MAX_M]) {
    const uint16_t* x = in.bf16 + first * in.step;
    Vector total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = zero();
    const int64_t whole = in.k / 32 * 32;
    auto add = [&](int64_t j, __mmask32 mask) {
        for (int r = 0; r < R; ++r) {
            const uint16_t* weights = reinterpret_cast<const uint16_t*>(rows[r]) + j;
            prefetch(reinterpret_cast<const uint8_t*>(weights) + ahead);
            const __m512i weight = _mm512_maskz_loadu_epi16(mask, weights);
            for (int m = 0; m < M; ++m) total[r][m] = dot(total[r][m], weight, x + m * in.step + j);
        }
    };
    for (int64_t j = 0; j < whole; j += 32) add(j, ~__mmask32(0));
    if (whole < in.k) add(whole, (__mmask32(1) << (in.k - whole)) - 1);
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[r][first + m] = sum(total[r][m]);
}
#endif

// ---- integers: int8 weights times x as three digits; exact but for the last rounding -----------------------------

#if defined(__AVX512VNNI__)
#define GEMCUT_DIGITS 1
typedef __m512i Sums;
inline Sums no_sums() { return _mm512_setzero_si512(); }
// The instruction multiplies unsigned by signed bytes: weights are read as weight + 128, and 128 times the sum of the
// digits is taken off at the end.
constexpr int DIGIT_BIAS = 128, DIGIT_STEP = 64;
typedef __m512i Bytes;
inline Bytes load_weights(const uint8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(int8_t(0x80)));
}
inline Sums add_products(Sums sums, Bytes weights, const int8_t* digits) {
    return _mm512_dpbusd_epi32(sums, weights, _mm512_loadu_si512(digits));
}
inline int64_t total_of(Sums sums) { return _mm512_reduce_add_epi32(sums); }
#elif defined(__ARM_FEATURE_DOTPROD)
#define GEMCUT_DIGITS 1
typedef int32x4_t Sums;
typedef int8x16_t Bytes;
constexpr int DIGIT_BIAS = 0, DIGIT_STEP = 16;
inline Sums no_sums() { return vdupq_n_s32(0); }
inline Bytes load_weights(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
inline Sums add_products(Sums sums, Bytes weights, const int8_t* digits) {
    return vdotq_s32(sums, weights, vld1q_s8(digits));
}
inline int64_t total_of(Sums sums) { return vaddvq_s32(sums); }
#endif

#ifdef GEMCUT_DIGITS
template <int R, int M>
void int8_digits(const uint8_t* const* rows, const Input& in, int first, int64_t ahead, float (*out)[MAX_M]) {
    const int8_t* x = in.digits + first * 3 * in.step;
    Sums sums[R][M][3];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m)
            for (int d = 0; d < 3; ++d) sums[r][m][d] = no_sums();
    const int64_t whole = in.k / DIGIT_STEP * DIGIT_STEP;
    for (int64_t j = 0; j < whole; j += DIGIT_STEP) {
        Bytes weights[R];
        for (int r = 0; r < R; ++r) {
            if (j % 64 == 0) prefetch(rows[r] + j + ahead);
            weights[r] = load_weights(rows[r] + j);
        }
        for (int m = 0; m < M; ++m)
            for (int d = 0; d < 3; ++d)
                for (int r = 0; r < R; ++r)
                    sums[r][m][d] = add_products(sums[r][m][d], weights[r], x + (m * 3 + d) * in.step + j);
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
            int64_t parts[3];
            for (int d = 0; d < 3; ++d) {
                const int8_t* digits = x + (m * 3 + d) * in.step;
                parts[d] = total_of(sums[r][m][d]);
                for (int64_t j = whole; j < in.k; ++j)
                    parts[d] += (int8_t(rows[r][j]) + DIGIT_BIAS) * int64_t(digits[j]);
                parts[d] -= int64_t(DIGIT_BIAS) * in.digit_sums[(first + m) * 3 + d];
            }
            const int64_t result = parts[0] + parts[1] * 256 + parts[2] * 65536;
            out[r][first + m] = float(double(result) * in.digit_scale[first + m]);
        }
}
#endif

}  // namespace
