// Computes: a panel of weights, dequantized for the micro-kernels of gemm_block.h
// Shapes: up to 256 rows of PANEL_K = 256 values, bf16 (fp32 where the micro-kernel multiplies in fp32)
// Runs: one thread a panel, in gemm.cpp
// Schedule: packing, as in GotoBLAS; the next panel is prefetched into L2
// Invariants: a weight is code * absmax in fp32, rounded to bf16 once: the same number as dequantizing the whole matrix
//
// Where the micro-kernel multiplies in fp32, the value rounded to bf16 is kept as fp32. (AVX-512's rounding
// instruction makes bf16's subnormals zero.)
#pragma once
#include "linear.h"
#include "simd.h"

#if defined(__AVX2__)

namespace {

constexpr int64_t PANEL_K = 256;

#if defined(__AVX512BF16__)
typedef uint16_t Element;
#else
typedef float Element;
#endif

inline float block_absmax(const Segment& segment, int64_t block) {
    if (segment.nested_scale == nullptr) return static_cast<const float*>(segment.absmax)[block];
    const uint8_t code = static_cast<const uint8_t*>(segment.absmax)[block];
    return segment.nested_map[code] * segment.nested_scale[block >> 8] + segment.nested_offset;
}

#if defined(__AVX512BF16__)

// 16 values to 32 codebook entries: the 16 twice, so that the fifth bit of an index does not matter.
inline __m512i scaled_codebook(__m512 codebook, float scale) {
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(scale))));
}

// 32 codes of 16 bytes, the high half of each first.
inline void dequantize_codes(const uint8_t* from, __m512i codebook, Element* to) {
    const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512i places = _mm512_or_si512(_mm512_srli_epi32(words, 4), _mm512_slli_epi32(words, 16));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, codebook));
}

inline void dequantize_bytes(const uint8_t* from, float scale, int64_t count, Element* to) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t j = 0; j < count; j += 32) {
        const int64_t left = count - j;
        const __mmask32 mask = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        const __m256i codes = _mm256_maskz_loadu_epi8(mask, from + j);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
        const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
        _mm512_storeu_si512(to + j, (__m512i)pair);
    }
}

inline void copy_bf16(const uint16_t* from, int64_t count, Element* to) { memcpy(to, from, size_t(count) * 2); }

#else

// fp32 to the nearest bf16, kept as fp32.
inline float round_bf16(float value) { return from_bf16(to_bf16(value)); }

inline void dequantize_bytes(const uint8_t* from, float scale, int64_t count, Element* to) {
    for (int64_t j = 0; j < count; ++j) to[j] = round_bf16(float(int8_t(from[j])) * scale);
}

inline void copy_bf16(const uint16_t* from, int64_t count, Element* to) {
    for (int64_t j = 0; j < count; ++j) to[j] = from_bf16(from[j]);
}

inline Codebook scaled_codebook(const float* codebook, float scale) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = round_bf16(codebook[i] * scale);
    return make_codebook(values);
}

// 32 codes of 16 bytes, the high half of each first.
inline void dequantize_codes(const uint8_t* from, const Codebook& codebook, Element* to) {
#if defined(__AVX512F__)
    for (int j = 0; j < 32; j += 16) {
        const __m512i words = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + j / 2)));
        const __m512i places = _mm512_or_si512(_mm512_srli_epi64(words, 4), _mm512_slli_epi64(words, 32));
        _mm512_storeu_ps(to + j, lookup<0>(codebook, places));
    }
#else
    for (int j = 0; j < 32; j += 8) {
        int32_t bytes;
        memcpy(&bytes, from + j / 2, 4);
        const __m256i words = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
        const __m256i places = _mm256_or_si256(_mm256_srli_epi64(words, 4), _mm256_slli_epi64(words, 32));
        _mm256_storeu_ps(to + j, lookup<0>(codebook, places));
    }
#endif
}

#endif

// Values [first, first + count) of one row; at most PANEL_K.
inline void dequantize_row(const Segment& segment, int64_t row, int64_t k, int64_t first, int64_t count, Element* to) {
    const int64_t start = row * k + first;
    if (segment.kind == BF16) return copy_bf16(reinterpret_cast<const uint16_t*>(segment.data) + start, count, to);
    if (segment.kind == INT8) {
        const float scale = static_cast<const float*>(segment.absmax)[row] / 127.0f;
        return dequantize_bytes(segment.data + start, scale, count, to);
    }
    // A row is a whole number of blocks of a power of two from 32 on, so these stretches never cross a block's border.
    const int64_t stretch = segment.block_size < count ? segment.block_size : count;
#if defined(__AVX512BF16__)
    const __m512 values = _mm512_loadu_ps(segment.codebook);
#else
    const float* values = segment.codebook;
#endif
    for (int64_t j = 0; j < count; j += stretch) {
        const auto codebook = scaled_codebook(values, block_absmax(segment, (start + j) / segment.block_size));
        const int64_t end = j + stretch < count ? j + stretch : count;
        for (int64_t i = j; i < end; i += 32) dequantize_codes(segment.data + (start + i) / 2, codebook, to + i);
    }
}

// Asks for `count` values of a row from `first` on, to be there when they are needed.
inline void fetch_row(const Segment& segment, int64_t row, int64_t k, int64_t first, int64_t count) {
    // Twice the bytes of a value.
    const int64_t size = segment.kind == FOUR_BIT ? 1 : segment.kind == INT8 ? 2 : 4;
    const char* from = reinterpret_cast<const char*>(segment.data) + (row * k + first) * size / 2;
    for (int64_t j = 0; j < count * size / 2; j += 64) __builtin_prefetch(from + j, 0, 2);
}

// Rows [row, row + rows) to `to`; `padded_rows` and a multiple of 32 columns are filled, with zeros where nothing is.
inline void dequantize_panel(const Segment& segment, int64_t row, int64_t rows, int64_t padded_rows, int64_t k,
                         int64_t first, int64_t count, Element* to) {
    const int64_t padded = (count + 31) / 32 * 32;
    for (int64_t r = 0; r < padded_rows; ++r, to += PANEL_K) {
        if (r >= rows || padded > count) memset(to, 0, size_t(padded) * sizeof(Element));
        if (r >= rows) continue;
        // Short parts of many rows: the hardware prefetcher would not guess what comes next. At a row's end that is the
        // next panel's beginning.
        const bool more = first + count < k;
        if (more || row + rows + r < segment.rows)
            fetch_row(segment, more ? row + r : row + rows + r, k, more ? first + count : 0, count);
        dequantize_row(segment, row + r, k, first, count, to);
    }
}

}  // namespace

#endif
