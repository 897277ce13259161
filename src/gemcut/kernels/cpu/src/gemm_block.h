// Computes: 32 rows of a weight panel times 16 or 32 rows of x, added to tiles of sums: the GEMM's micro-kernel
// Shapes: weights [32, PANEL_K]; x in strips of 16 rows; sums fp32 [16 weights' rows, 16 rows of x] a tile
// Runs: one thread for one panel, in gemm.cpp
// Schedule: register blocking (GotoBLAS, Goto and van de Geijn 2008); AMX tiles, AVX-512 BF16 dot products, or fp32 FMA
// Invariants: each sum is added in the order of k; count is a multiple of 32
//
// x is packed in strips of 16 rows: for each pair of inputs (each input where sums are made in fp32) the 16 rows stand
// side by side. Weights' rows are read as they are dequantized, and only the result, which is small, is transposed
// (gemm.cpp).
#pragma once
#include "gemm_panel.h"

#if defined(__AVX2__)

namespace {

constexpr int TILE = 16, TILE_SUMS = TILE * TILE, BLOCK_ROWS = 32;

// `weights`: 32 rows PANEL_K apart; `x`: the first of `strips` (1 or 2) strips, `strip_step` elements apart; `count`: a
// multiple of 32; `sums`: tiles, those of the second 16 rows `row_step` floats after those of the first.
// `fresh`: sums begin at zero.

#if defined(__AMX_BF16__)

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

inline void begin_blocks() {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = TILE;
    // Not the intrinsic: gcc 12 tells the optimiser that it reads eight bytes only, and the others are never written.
    asm volatile("ldtilecfg %0" : : "m"(config));
}
inline void end_blocks() { _tile_release(); }

inline void block(const Element* weights, const Element* x, int strips, int64_t strip_step, int64_t count, bool fresh,
                  float* sums, int64_t row_step) {
    constexpr int ROW = PANEL_K * sizeof(Element), SUMS = TILE * sizeof(float);
    const Element* lower = weights + TILE * PANEL_K;
    // gcc 12's tile loads do not say that they read memory: nothing written before may be held back.
    asm volatile("" : : : "memory");
    if (strips == 2) {
        if (fresh) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, sums, SUMS);
            _tile_loadd(1, sums + TILE_SUMS, SUMS);
            _tile_loadd(2, sums + row_step, SUMS);
            _tile_loadd(3, sums + row_step + TILE_SUMS, SUMS);
        }
        for (int64_t j = 0; j < count; j += 32) {
            _tile_loadd(4, weights + j, ROW);
            _tile_loadd(6, x + j * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, lower + j, ROW);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, x + strip_step + j * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, SUMS);
        _tile_stored(1, sums + TILE_SUMS, SUMS);
        _tile_stored(2, sums + row_step, SUMS);
        _tile_stored(3, sums + row_step + TILE_SUMS, SUMS);
        return;
    }
    if (fresh) {
        _tile_zero(0);
        _tile_zero(2);
    } else {
        _tile_loadd(0, sums, SUMS);
        _tile_loadd(2, sums + row_step, SUMS);
    }
    for (int64_t j = 0; j < count; j += 32) {
        _tile_loadd(4, weights + j, ROW);
        _tile_loadd(6, x + j * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower + j, ROW);
        _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, sums, SUMS);
    _tile_stored(2, sums + row_step, SUMS);
}

#else

inline void begin_blocks() {}
inline void end_blocks() {}

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS_AT_ONCE = 8;
#else
constexpr int LANES = 8, ROWS_AT_ONCE = 4;
#endif

#if defined(__AVX512BF16__)
constexpr int DEPTH = 2;  // inputs of one multiplication
inline __m512 multiply_add(const Element* weights, __m512i x, __m512 sum) {
    int32_t pair;
    memcpy(&pair, weights, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)x);
}
inline __m512i load_inputs(const Element* x) { return _mm512_loadu_si512(x); }
#else
constexpr int DEPTH = 1;
inline Vector multiply_add(const Element* weights, Vector x, Vector sum) {
#if defined(__AVX512F__)
    return fma(_mm512_set1_ps(*weights), x, sum);
#else
    return fma(_mm256_broadcast_ss(weights), x, sum);
#endif
}
inline Vector load_inputs(const Element* x) { return load(x); }
#endif

// R rows of weights by V vectors of rows of x, which stand x_step apart and whose sums stand sum_step apart.
template <int R, int V>
inline void rows_by_vectors(const Element* weights, const Element* const (&x)[V], int64_t count, bool fresh,
                            float* const (&sums)[V]) {
    Vector total[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) total[r][v] = fresh ? zero() : load(sums[v] + r * TILE);
    for (int64_t j = 0; j < count; j += DEPTH) {
        decltype(load_inputs(x[0])) inputs[V];
        for (int v = 0; v < V; ++v) inputs[v] = load_inputs(x[v] + j * TILE);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) total[r][v] = multiply_add(weights + r * PANEL_K + j, inputs[v], total[r][v]);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(sums[v] + r * TILE, total[r][v]);
}

inline void block(const Element* weights, const Element* x, int strips, int64_t strip_step, int64_t count, bool fresh,
                  float* sums, int64_t row_step) {
    for (int row = 0; row < BLOCK_ROWS; row += ROWS_AT_ONCE) {
        float* to = sums + row / TILE * row_step + row % TILE * TILE;
        const Element* from = weights + row * PANEL_K;
#if defined(__AVX512F__)
        if (strips == 2) {
            const Element* const inputs[2] = {x, x + strip_step};
            float* const places[2] = {to, to + TILE_SUMS};
            rows_by_vectors<ROWS_AT_ONCE, 2>(from, inputs, count, fresh, places);
        } else {
            const Element* const inputs[1] = {x};
            float* const places[1] = {to};
            rows_by_vectors<ROWS_AT_ONCE, 1>(from, inputs, count, fresh, places);
        }
#else
        for (int s = 0; s < strips; ++s) {
            const Element* const inputs[2] = {x + s * strip_step, x + s * strip_step + LANES};
            float* const places[2] = {to + s * TILE_SUMS, to + s * TILE_SUMS + LANES};
            rows_by_vectors<ROWS_AT_ONCE, 2>(from, inputs, count, fresh, places);
        }
#endif
    }
}

#endif

}  // namespace

#endif
