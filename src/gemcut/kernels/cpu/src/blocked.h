// Computes: inner products of rows of weights with tiles of x, where registers hold 16 vectors of eight values (AVX2)
// Shapes: R rows of codes or values; x in tiles of M rows, packed by tiles.h; totals [R, M] vectors, added to
// Runs: one thread for a group of rows, in linear.cpp
// Schedule: register blocking; a weight is unpacked once for a tile's rows; the part of x in use stays in L1
// Invariants: a total has the same order whatever R and M are: one addition a UNIT, or a vector, in the order of k
#pragma once
#include "rows.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define GEMCUT_BLOCKED 1

namespace {

// Rows of x that meet a row of weights at once: with products of integers, and of fp32.
constexpr int SHORT_TILE = 8, VALUE_TILE = 4;
// Inputs of x that a vector of sums takes at once.
constexpr int64_t PAIR = 2 * W;

// ---- four-bit and 8-bit weights: integers of 16 bits times those of x ----------------------------------------------

struct FourBitCodes {
    static constexpr int BYTES = UNIT_BYTES;
    ShortCodebook codebook;
    void unpack(const uint8_t* p, Ints (&out)[4]) const { dequantize_shorts(codebook, p, out); }
};

struct ByteCodes {
    static constexpr int BYTES = UNIT;
    void unpack(const uint8_t* p, Ints (&out)[4]) const {
        for (int e = 0; e < 4; ++e)
            out[e] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * e)));
    }
};

// `x`: a tile's shorts from this unit on; `x_scales`: SHORT_TILE of them a unit; `scales`: N of the row's a unit, none if N
// is 0; `ahead`: bytes from here to what will be read some microseconds later.
template <int M, int N, typename Codes>
void short_units(const Codes& codes, const uint8_t* row, const float* scales, const int16_t* x, const float* x_scales,
                 int64_t units, int64_t ahead, Vector* totals) {
    Vector total[M];
    alignas(32) float products[SHORT_TILE];
    for (int m = 0; m < M; ++m) total[m] = totals[m];
    for (int64_t u = 0; u < units; ++u, x += M * UNIT, x_scales += SHORT_TILE, row += Codes::BYTES) {
        Ints weights[4];
        if (Codes::BYTES == 64 || u % 2 == 0) prefetch(row + ahead);
        codes.unpack(row, weights);
        const float* factors = x_scales;
        if (N == 1) {
            // One product of vectors for all rows; in registers the compiler would make eight of single values.
            store(products, multiply(broadcast<1>(scales + u), load(x_scales)));
            asm volatile("" : : : "memory");
            factors = products;
        }
        for (int m = 0; m < M; ++m) {
            const int16_t* xm = x + m * UNIT;
            Ints part = pairs(weights[0], load_shorts(xm));
            for (int e = 1; e < 4; ++e) part = add_pairs(part, weights[e], load_shorts(xm + e * (UNIT / 4)));
            Vector factor = broadcast<1>(factors + m);
            if (N == 2) factor = multiply(broadcast<2>(scales + 2 * u), factor);
            total[m] = fma(factor, to_float(part), total[m]);
        }
    }
    for (int m = 0; m < M; ++m) totals[m] = total[m];
}

template <int N, typename Codes>
void short_rows(int rows, const Codes& codes, const uint8_t* row, const float* scales, const int16_t* x,
                const float* x_scales, int64_t units, int64_t ahead, Vector* totals) {
    typedef void (*Function)(const Codes&, const uint8_t*, const float*, const int16_t*, const float*, int64_t, int64_t,
                             Vector*);
    static const Function of_rows[SHORT_TILE] = {
        short_units<1, N, Codes>, short_units<2, N, Codes>, short_units<3, N, Codes>, short_units<4, N, Codes>,
        short_units<5, N, Codes>, short_units<6, N, Codes>, short_units<7, N, Codes>, short_units<8, N, Codes>};
    of_rows[rows - 1](codes, row, scales, x, x_scales, units, ahead, totals);
}

// The same for one row of x and R of weights, whose sums stay in registers. `rows`, `scales`: of each row of weights.
template <int R, int N, typename Codes>
inline void one_row_units(const Codes& codes, const uint8_t* const* rows, const float* const* scales, const int16_t* x,
                          const float* x_scales, int64_t units, int64_t ahead, Vector (&totals)[R]) {
    Vector total[R];
    for (int r = 0; r < R; ++r) total[r] = totals[r];
    for (int64_t u = 0; u < units; ++u, x += UNIT) {
        if (Codes::BYTES == 64 || u % 2 == 0)
            for (int r = 0; r < R; ++r) prefetch(rows[r] + u * Codes::BYTES + ahead);
        const Vector x_scale = broadcast<1>(x_scales + u * SHORT_TILE);
        for (int r = 0; r < R; ++r) {
            Ints weights[4];
            codes.unpack(rows[r] + u * Codes::BYTES, weights);
            Ints part = pairs(weights[0], load_shorts(x));
            for (int e = 1; e < 4; ++e) part = add_pairs(part, weights[e], load_shorts(x + e * (UNIT / 4)));
            Vector factor = x_scale;
            if (N > 0) factor = multiply(broadcast<N == 0 ? 1 : N>(scales[r] + u * N), x_scale);
            total[r] = fma(factor, to_float(part), total[r]);
        }
    }
    for (int r = 0; r < R; ++r) totals[r] = total[r];
}

// Sums of eight vectors, each in the order of `sum`.
inline void sum_eight(const Vector* v, float* out) {
    __m128 halves[8], pairs_of[4];
    for (int i = 0; i < 8; ++i) halves[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
    for (int i = 0; i < 4; ++i)
        pairs_of[i] = _mm_add_ps(_mm_movelh_ps(halves[2 * i], halves[2 * i + 1]),
                                 _mm_movehl_ps(halves[2 * i + 1], halves[2 * i]));
    for (int i = 0; i < 2; ++i) {
        const __m128 a = pairs_of[2 * i], b = pairs_of[2 * i + 1];
        _mm_storeu_ps(out + 4 * i, _mm_add_ps(_mm_shuffle_ps(a, b, 0x88), _mm_shuffle_ps(a, b, 0xdd)));
    }
}

// ---- bf16 and fp32 weights, fp32 sums ------------------------------------------------------------------------------

// Half of PAIR inputs: the even ones in bf16, the first ones in fp32; then the others.
inline Vector half_of(const uint16_t* p, int half) {
    Vector even, odd;
    load_pairs(p, even, odd);
    return half == 0 ? even : odd;
}
inline Vector half_of(const float* p, int half) { return load(p + half * W); }

// `x`: a tile's values from here on; `count`: inputs, a multiple of PAIR; `totals`: [R][M].
template <int R, int M, typename T>
void values(const T* const* rows, const float* x, int64_t count, int64_t ahead, Vector* totals) {
    Vector total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = totals[r * M + m];
    for (int64_t j = 0; j < count; j += PAIR, x += PAIR * M) {
        for (int r = 0; r < R; ++r) prefetch(reinterpret_cast<const uint8_t*>(rows[r] + j) + ahead);
        for (int half = 0; half < 2; ++half) {
            Vector weights[R];
            for (int r = 0; r < R; ++r) weights[r] = half_of(rows[r] + j, half);
            for (int m = 0; m < M; ++m) {
                Vector inputs = load(x + m * PAIR + half * W);
                asm volatile("" : "+x"(inputs));  // one load for all rows, not one in each multiplication
                for (int r = 0; r < R; ++r) total[r][m] = fma(weights[r], inputs, total[r][m]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) totals[r * M + m] = total[r][m];
}

}  // namespace

#endif
