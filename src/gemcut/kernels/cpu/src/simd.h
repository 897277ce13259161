// Computes: a thin layer over each instruction set: W floats in a Vector, and how packed weights become Vectors
// Shapes: Vector: W fp32 values (16 with AVX-512, 8 with AVX2, 4 on Arm); Words: UNIT codes of four bits
// Runs: every file in src/variant
// Schedule: vector permutations as codebook look-ups
// Invariants: the same operations on every instruction set; where roundings differ, the comment says so
#pragma once
#include "gemcut.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)

constexpr int W = 16;
typedef __m512 Vector;
typedef __m512i Words;
struct Codebook { __m512 values; };

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
inline Vector load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vector load(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// The even and the odd ones of 2 W values.
inline void load_pairs(const uint16_t* p, Vector& even, Vector& odd) {
    const __m512i words = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))));
}
inline Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codebook make_codebook(const float* values) { return {_mm512_loadu_ps(values)}; }
// The values of the nibbles at bit `shift` of each word; the permutation looks at four bits only.
template <int shift>
inline Vector lookup(const Codebook& codebook, Words words) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift), codebook.values);
}
// `n` absmax values, each for W / n neighbouring lanes.
template <int n>
inline Vector broadcast(const float* p) {
    if (n == 1) return _mm512_set1_ps(*p);
    if (n == 2) return _mm512_insertf32x8(_mm512_set1_ps(p[0]), _mm256_set1_ps(p[1]), 1);
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(places, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// map[codes] * scale + offset, in two roundings. Writes `out` up to the next multiple of 16.
#if defined(__AVX512VBMI__)
// 64 look-ups of one byte of the values at a time, which is four times as fast as gathering.
inline __m512i look_up_bytes(const uint8_t* plane, __m512i codes) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), codes, _mm512_loadu_si512(plane + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), codes, _mm512_loadu_si512(plane + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}
inline void dequantize_absmax(const uint8_t* codes, int64_t count, const float*, const uint8_t* planes, float scale,
                          float offset, float* out) {
    // Unpacking works within 16 bytes; codes are moved so that its results are 16 neighbours each.
    const __m512i order = _mm512_setr_epi32(
        0x03020100, 0x13121110, 0x23222120, 0x33323130, 0x07060504, 0x17161514, 0x27262524, 0x37363534, 0x0b0a0908,
        0x1b1a1918, 0x2b2a2928, 0x3b3a3938, 0x0f0e0d0c, 0x1f1e1d1c, 0x2f2e2d2c, 0x3f3e3d3c);
    for (int64_t i = 0; i < count; i += 64) {
        const int64_t left = count - i;
        const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        const __m512i moved = _mm512_permutexvar_epi8(order, _mm512_maskz_loadu_epi8(mask, codes + i));
        const __m512i b0 = look_up_bytes(planes, moved), b1 = look_up_bytes(planes + 256, moved);
        const __m512i b2 = look_up_bytes(planes + 512, moved), b3 = look_up_bytes(planes + 768, moved);
        const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
        const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
        const __m512i values[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                                   _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
        // Whole stores: what is read soon after a masked one has to wait for the cache.
        for (int j = 0; j < 4 && 16 * j < left; ++j) {
            const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(values[j]), _mm512_set1_ps(scale));
            _mm512_storeu_ps(out + i + 16 * j, _mm512_add_ps(product, _mm512_set1_ps(offset)));
        }
    }
}
#else
inline void dequantize_absmax(const uint8_t* codes, int64_t count, const float* map, const uint8_t*, float scale,
                          float offset, float* out) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
        const __m512i places = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + i));
        const __m512 product = _mm512_mul_ps(_mm512_i32gather_ps(places, map, 4), _mm512_set1_ps(scale));
        _mm512_storeu_ps(out + i, _mm512_add_ps(product, _mm512_set1_ps(offset)));
    }
}
#endif

#elif defined(__AVX2__)

constexpr int W = 8;
typedef __m256 Vector;
typedef __m256i Words;
struct Codebook { __m256 low, high; };

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline float sum(Vector v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline Vector load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vector load(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void load_pairs(const uint16_t* p, Vector& even, Vector& odd) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000))));
}
inline Words load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Codebook make_codebook(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
// The permutation looks at three bits; the fourth, moved to the sign, chooses the half of the codebook.
template <int shift>
inline Vector lookup(const Codebook& codebook, Words words) {
    const __m256i places = _mm256_srli_epi32(words, shift);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - shift));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(codebook.low, places), _mm256_permutevar8x32_ps(codebook.high, places),
                            upper);
}
template <int n>
inline Vector broadcast(const float* p) {
    if (n == 1) return _mm256_set1_ps(*p);
    return _mm256_insertf128_ps(_mm256_set1_ps(p[0]), _mm_set1_ps(p[1]), 1);
}

#elif defined(__aarch64__)

constexpr int W = 4;
typedef float32x4_t Vector;
typedef uint32x4_t Words;
struct Codebook { uint8x16x4_t bytes; };

inline Vector zero() { return vdupq_n_f32(0); }
inline Vector load(const float* p) { return vld1q_f32(p); }
inline Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline float sum(Vector v) { return vaddvq_f32(v); }
inline Vector load(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word))))));
}
inline Vector load(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline void load_pairs(const uint16_t* p, Vector& even, Vector& odd) {
    const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(p));
    even = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
    odd = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)));
}
inline Words load_words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline Codebook make_codebook(const float* values) {
    return {{vreinterpretq_u8_f32(vld1q_f32(values)), vreinterpretq_u8_f32(vld1q_f32(values + 4)),
             vreinterpretq_u8_f32(vld1q_f32(values + 8)), vreinterpretq_u8_f32(vld1q_f32(values + 12))}};
}
// Each nibble becomes the places of its value's four bytes in the codebook.
template <int shift>
inline Vector lookup(const Codebook& codebook, Words words) {
    const Words moved = shift ? vshrq_n_u32(words, shift ? shift : 1) : words;
    const Words nibbles = vandq_u32(moved, vdupq_n_u32(15));
    const Words places = vmlaq_n_u32(vdupq_n_u32(0x03020100), nibbles, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(codebook.bytes, vreinterpretq_u8_u32(places)));
}
template <int n>
inline Vector broadcast(const float* p) { return vdupq_n_f32(*p); }

#endif

#if !defined(__AVX512F__)
// map[codes] * scale + offset, in two roundings.
inline void dequantize_absmax(const uint8_t* codes, int64_t count, const float* map, const uint8_t*, float scale,
                          float offset, float* out) {
    int64_t i = 0;
#if defined(__AVX2__)
    // Eight loads of single values: a gather is no faster, and compilers differ in what they make of a plain loop.
    for (; i + 8 <= count; i += 8) {
        const uint8_t* c = codes + i;
        const __m256 values = _mm256_setr_ps(map[c[0]], map[c[1]], map[c[2]], map[c[3]], map[c[4]], map[c[5]], map[c[6]],
                                             map[c[7]]);
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_mul_ps(values, _mm256_set1_ps(scale)), _mm256_set1_ps(offset)));
    }
#endif
    for (; i < count; ++i) out[i] = map[codes[i]] * scale + offset;
}
#endif

inline void store(float* p, Vector v) { memcpy(p, &v, sizeof v); }

// Bytes and values that load_words takes at once.
constexpr int UNIT_BYTES = 4 * W, UNIT = 8 * W;

inline float from_bf16(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}
inline uint16_t to_bf16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return uint16_t(word >> 16 | 0x40);  // NaN stays one
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline float as_float(float value) { return value; }
inline float as_float(int8_t value) { return float(value); }
inline float as_float(uint16_t value) { return from_bf16(value); }

}  // namespace
