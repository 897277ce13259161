// Computes: rows of x in the order in which blocked.h meets them, and a group of weights' rows times all of them
// Shapes: x [m, k] bf16 or fp32 in tiles of SHORT_TILE (VALUE_TILE) rows; a group is GROUP rows of weights
// Runs: linear.cpp (AVX2); packing and groups are both shared by threads
// Schedule: a tile is interleaved: for each UNIT (PAIR) of inputs its rows stand side by side, read from end to end
// Invariants: a result depends on its own rows of x and of weights alone
#pragma once
#include "blocked.h"
#include "linear.h"
#include "pool.h"
#include "scratch.h"

#ifdef GEMCUT_BLOCKED

namespace {

constexpr int GROUP = 12;
// A part of a tile of x that stays in L1 while a group's rows pass: units of one row of x, and inputs of a tile.
constexpr int64_t SHORT_CHUNK = 160, VALUE_CHUNK = 256;
// Where x is one row, rows of weights of so many bytes are read four side by side, which keeps the arithmetic busy.
// Shorter ones are read one after another: memory is fastest in sequence, and streams that end so soon are none.
constexpr int64_t LONG_ROW = 4096;
// What x packed for one pass over the weights may take of L2.
constexpr int64_t PACKED_BYTES = 192 << 10, MOST_PACKED = 64;

struct Tiles {
    int64_t m, k, units;
    int16_t *codes_x, *bytes_x;  // for four-bit and 8-bit weights; null: there are none
    float *codes_scales, *bytes_scales;
    float* values_x;  // for bf16 or fp32 weights; null: there are none
    const void* x;
    int64_t x_stride;
    bool x_is_bf16, finite;
};

// Rows [begin, end) of x to their tiles.
inline void pack_rows(void* context, int64_t begin, int64_t end, int) {
    Tiles& tiles = *static_cast<Tiles*>(context);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = i / SHORT_TILE, row = i % SHORT_TILE, left = tiles.m - tile * SHORT_TILE;
        const int64_t rows = left < SHORT_TILE ? left : SHORT_TILE, first = tile * SHORT_TILE * tiles.units;
        const int64_t value_tile = i / VALUE_TILE, value_row = i % VALUE_TILE, value_left = tiles.m - value_tile * VALUE_TILE;
        const int64_t value_rows = value_left < VALUE_TILE ? value_left : VALUE_TILE;
        float* values = tiles.values_x + value_tile * VALUE_TILE * tiles.units * UNIT + value_row * PAIR;
        for (int64_t u = 0; u < tiles.units; ++u) {
            alignas(32) float x[UNIT] = {};
            const int64_t start = u * UNIT, count = tiles.k - start < UNIT ? tiles.k - start : UNIT;
            if (tiles.x_is_bf16) {
                const uint16_t* from = static_cast<const uint16_t*>(tiles.x) + i * tiles.x_stride + start;
                if (count == UNIT)
                    for (int64_t j = 0; j < UNIT; ++j) x[j] = from_bf16(from[j]);
                else
                    for (int64_t j = 0; j < count; ++j) x[j] = from_bf16(from[j]);
            } else {
                memcpy(x, static_cast<const float*>(tiles.x) + i * tiles.x_stride + start, size_t(count) * 4);
            }
            if (tiles.codes_x != nullptr) {
                int16_t shorts[UNIT];
                if (!unit_to_shorts(x, 14, shorts, tiles.codes_scales + first + u * SHORT_TILE + row)) tiles.finite = false;
                order_shorts(shorts, tiles.codes_x + (first + u * rows + row) * UNIT);
            }
            // Weights of seven bits leave room for fifteen: what bf16 has, in values down to 2^-7 of the largest.
            if (tiles.bytes_x != nullptr && !unit_to_shorts(x, 15, tiles.bytes_x + (first + u * rows + row) * UNIT,
                                                            tiles.bytes_scales + first + u * SHORT_TILE + row))
                tiles.finite = false;
            if (tiles.values_x == nullptr) continue;
            for (int64_t j = 0; j < UNIT; j += PAIR) {
                float* to = values + (start + j) * value_rows;
                if (!tiles.x_is_bf16) memcpy(to, x + j, PAIR * sizeof(float));
                else
                    for (int l = 0; l < W; ++l) to[l] = x[j + 2 * l], to[W + l] = x[j + 2 * l + 1];
            }
        }
    }
}

// Rows of x that one pass over the weights takes.
inline int64_t rows_at_once(const Plan& plan, int64_t m) {
    int64_t bytes = 0;
    for (int64_t s = 0; s < plan.count; ++s) {
        const int64_t here = plan.segments[s].kind == FOUR_BIT || plan.segments[s].kind == INT8 ? 2 * plan.k : 4 * plan.k;
        bytes = bytes > here ? bytes : here;
    }
    int64_t rows = PACKED_BYTES / bytes / SHORT_TILE * SHORT_TILE;
    rows = rows < SHORT_TILE ? SHORT_TILE : rows > MOST_PACKED ? MOST_PACKED : rows;
    return m < rows ? m : rows;
}

// Whether the kernels of blocked.h serve all of a plan's matrices.
inline bool serves(const Plan& plan, bool x_is_bf16) {
    for (int64_t s = 0; s < plan.count; ++s)
        if ((plan.segments[s].kind != FP32) != x_is_bf16) return false;
    return true;
}

// Packs x; false if some row's numbers forbid integers.
inline bool pack(Tiles& tiles, const Plan& plan, const void* x, int64_t m, int64_t x_stride, bool x_is_bf16, int threads) {
    bool four_bit = false, int8 = false, values = false;
    for (int64_t s = 0; s < plan.count; ++s) {
        const int64_t kind = plan.segments[s].kind;
        four_bit |= kind == FOUR_BIT, int8 |= kind == INT8, values |= kind == BF16 || kind == FP32;
    }
    const int64_t units = (plan.k + UNIT - 1) / UNIT, count = units * UNIT * m;
    const int64_t scales = (m + SHORT_TILE - 1) / SHORT_TILE * SHORT_TILE * units;
    char* memory = static_cast<char*>(scratch(size_t(count) * 8 + size_t(scales) * 8));
    float* of_codes = reinterpret_cast<float*>(memory);
    float* of_bytes = of_codes + scales;
    float* packed = of_bytes + scales;
    int16_t* shorts = reinterpret_cast<int16_t*>(packed + count);
    tiles.m = m, tiles.k = plan.k, tiles.units = units;
    tiles.codes_x = four_bit ? shorts : nullptr, tiles.codes_scales = of_codes;
    tiles.bytes_x = int8 ? shorts + count : nullptr, tiles.bytes_scales = of_bytes;
    tiles.values_x = values ? packed : nullptr;
    tiles.x = x, tiles.x_stride = x_stride, tiles.x_is_bf16 = x_is_bf16, tiles.finite = true;
    if (m % SHORT_TILE != 0) memset(of_codes, 0, size_t(scales) * 8);
    gemcut_parallel(pack_rows, &tiles, m, 1 + 16384 / plan.k, threads);
    return tiles.finite;
}

// The rows of a group, as kernels meet them.
struct GroupRows {
    const uint8_t* const* data;
    const float* const* scales;  // FOUR_BIT: `per_unit` of them a UNIT
    int per_unit;
    const float* absmax;  // INT8: one a row
    int64_t ahead;
};

typedef float Results[GROUP][MOST_PACKED];
typedef Vector Totals[MOST_PACKED / VALUE_TILE * GROUP * VALUE_TILE];

inline int rows_of_tile(int64_t m, int64_t first, int64_t size) { return int(m - first < size ? m - first : size); }

// Integers: one row of x with a group's rows, R of them at a time.
template <int R, int N, typename Codes>
void short_group_of_one(const Codes& codes, const Tiles& tiles, const int16_t* x, const float* x_scales,
                        const GroupRows& rows, Results& out) {
    const int64_t units = tiles.k / UNIT, rest = tiles.k % UNIT * Codes::BYTES / UNIT;
    for (int r = 0; r < GROUP; r += R) {
        Vector totals[R];
        for (int i = 0; i < R; ++i) totals[i] = zero();
        one_row_units<R, N>(codes, rows.data + r, rows.scales + r, x, x_scales, units, rows.ahead, totals);
        if (rest > 0) {
            uint8_t last[R][Codes::BYTES] = {};
            const uint8_t* data[R];
            const float* scales[R];
            for (int i = 0; i < R; ++i) {
                memcpy(last[i], rows.data[r + i] + units * Codes::BYTES, size_t(rest));
                data[i] = last[i], scales[i] = N > 0 ? rows.scales[r + i] + units * N : nullptr;
            }
            one_row_units<R, N>(codes, data, scales, x + units * UNIT, x_scales + units * SHORT_TILE, 1, 0, totals);
        }
        for (int i = 0; i < R; ++i) out[r + i][0] = sum(totals[i]);
    }
}

// Integers: all tiles with a group's rows.
template <int N, typename Codes>
void short_group(const Codes& codes, const Tiles& tiles, const int16_t* x, const float* x_scales, const GroupRows& rows,
                 Results& out) {
    if (tiles.m == 1) {
        // Four-bit codes cost arithmetic, not memory: the loads of x serve four rows.
        if (N > 0 || tiles.k >= LONG_ROW) return short_group_of_one<4, N>(codes, tiles, x, x_scales, rows, out);
        return short_group_of_one<1, N>(codes, tiles, x, x_scales, rows, out);
    }
    alignas(32) Totals totals;
    const int64_t m = tiles.m, units = tiles.k / UNIT, rest = tiles.k % UNIT * Codes::BYTES / UNIT;
    for (int64_t i = 0; i < (m + SHORT_TILE - 1) / SHORT_TILE * GROUP * SHORT_TILE; ++i) totals[i] = zero();
    auto part = [&](int64_t u, int64_t count, const uint8_t* const* data, int64_t ahead) {
        for (int64_t first = 0; first < m; first += SHORT_TILE) {
            const int existing = rows_of_tile(m, first, SHORT_TILE);
            const int64_t place = first * tiles.units;
            for (int r = 0; r < GROUP; ++r)
                short_rows<N>(existing, codes, data[r], N > 0 ? rows.scales[r] + u * N : nullptr,
                              x + (place + u * existing) * UNIT, x_scales + place + u * SHORT_TILE, count, ahead,
                              totals + first * GROUP + r * SHORT_TILE);
        }
    };
    const int64_t chunk = SHORT_CHUNK / (m < SHORT_TILE ? m : SHORT_TILE);
    const uint8_t* data[GROUP];
    for (int64_t u = 0; u < units; u += chunk) {
        for (int r = 0; r < GROUP; ++r) data[r] = rows.data[r] + u * Codes::BYTES;
        part(u, units - u < chunk ? units - u : chunk, data, rows.ahead);
    }
    if (rest > 0) {
        uint8_t last[GROUP][Codes::BYTES] = {};
        for (int r = 0; r < GROUP; ++r) {
            memcpy(last[r], rows.data[r] + units * Codes::BYTES, size_t(rest));
            data[r] = last[r];
        }
        part(units, 1, data, 0);
    }
    for (int64_t first = 0; first < m; first += SHORT_TILE)
        for (int r = 0; r < GROUP; ++r) {
            float sums[SHORT_TILE];
            sum_eight(totals + first * GROUP + r * SHORT_TILE, sums);
            memcpy(out[r] + first, sums, sizeof sums);
        }
}

// Values: the same, R rows of weights at a time with whole tiles.
template <int R, typename T>
void value_group(const Tiles& tiles, const GroupRows& rows, Results& out) {
    alignas(32) Totals totals;
    const int64_t m = tiles.m, whole = tiles.k / PAIR * PAIR, rest = tiles.k - whole;
    for (int64_t i = 0; i < (m + VALUE_TILE - 1) / VALUE_TILE * GROUP * VALUE_TILE; ++i) totals[i] = zero();
    auto part = [&](int64_t j, int64_t count, const T* const* data, int64_t ahead) {
        for (int64_t first = 0; first < m; first += VALUE_TILE) {
            const int existing = rows_of_tile(m, first, VALUE_TILE);
            const float* x = tiles.values_x + first * tiles.units * UNIT + j * existing;
            Vector* to = totals + first * GROUP;
            if (existing == 4)
                for (int r = 0; r < GROUP; r += R) values<R, 4>(data + r, x, count, ahead, to + r * 4);
            else if (existing == 3)
                for (int r = 0; r < GROUP; r += 2) values<2, 3>(data + r, x, count, ahead, to + r * 3);
            else if (existing == 2)
                for (int r = 0; r < GROUP; r += 2) values<2, 2>(data + r, x, count, ahead, to + r * 2);
            else if (m > 1 || tiles.k * int64_t(sizeof(T)) >= LONG_ROW)
                for (int r = 0; r < GROUP; r += 4) values<4, 1>(data + r, x, count, ahead, to + r);
            else
                for (int r = 0; r < GROUP; ++r) values<1, 1>(data + r, x, count, ahead, to + r);
        }
    };
    const T* data[GROUP];
    const int64_t chunk = m > VALUE_TILE ? VALUE_CHUNK : whole;
    for (int64_t j = 0; j < whole; j += chunk) {
        for (int r = 0; r < GROUP; ++r) data[r] = reinterpret_cast<const T*>(rows.data[r]) + j;
        part(j, whole - j < chunk ? whole - j : chunk, data, rows.ahead);
    }
    if (rest > 0) {
        T last[GROUP][PAIR] = {};
        for (int r = 0; r < GROUP; ++r) {
            memcpy(last[r], reinterpret_cast<const T*>(rows.data[r]) + whole, size_t(rest) * sizeof(T));
            data[r] = last[r];
        }
        part(whole, PAIR, data, 0);
    }
    for (int64_t first = 0; first < m; first += VALUE_TILE) {
        const int existing = rows_of_tile(m, first, VALUE_TILE);
        for (int r = 0; r < GROUP; ++r)
            for (int i = 0; i < existing; ++i) out[r][first + i] = sum(totals[first * GROUP + r * existing + i]);
    }
}

// All rows of x with a group's rows of weights.
inline void multiply_group(const Tiles& tiles, const Segment& segment, const GroupRows& rows, Results& out) {
    if (segment.kind == BF16) return value_group<2, uint16_t>(tiles, rows, out);
    if (segment.kind == FP32) return value_group<2, float>(tiles, rows, out);
    if (segment.kind == INT8) {
        short_group<0>(ByteCodes(), tiles, tiles.bytes_x, tiles.bytes_scales, rows, out);
        for (int r = 0; r < GROUP; ++r)
            for (int64_t m = 0; m < tiles.m; ++m) out[r][m] *= rows.absmax[r] / 127.0f;
        return;
    }
    const FourBitCodes codes{make_short_codebook(segment.short_codebook)};
    if (rows.per_unit == 1) short_group<1>(codes, tiles, tiles.codes_x, tiles.codes_scales, rows, out);
    else short_group<2>(codes, tiles, tiles.codes_x, tiles.codes_scales, rows, out);
    const float factor = 1.0f / segment.short_factor;
    for (int r = 0; r < GROUP; ++r)
        for (int64_t m = 0; m < tiles.m; ++m) out[r][m] *= factor;
}

}  // namespace

#endif
