// Computes: y = x [W0; W1; ...]^T for a few rows of x, as fast as memory gives the weights
// Shapes: x bf16 or fp32 [m, k], any m; segments of linear.h; y bf16 or fp32 [m, columns]
// Runs: gemcut/kernels/cpu/linear.py; threads by groups of four rows of W
// Schedule: GEMV, weights streamed once with software prefetch; integer arithmetic for bf16 x (VNNI, dot products)
// Invariants: results depend neither on the number of threads nor on which rows are multiplied together
//
// Rows of weights are taken four at a time, each read once from end to end while the next ones are prefetched. Rows of
// bf16, which need the most bytes and the least arithmetic, are taken one after another: memory is fastest that way.
// Rows of x are prepared once, in the order in which the packed values come out of their bytes. Four-bit values are
// multiplied before they are scaled: the absmax of a block meets the sum over its values. That costs one
// multiplication a block, and rounds less than scaling every weight.
//
// Eight rows of x are taken at a time; with AVX2 up to 64 of them in tiles (tiles.h), which unpack a weight once for eight.
//
// x in bf16 meets packed weights as integers, in which a processor multiplies fastest: 23 bits for int8 weights, exact
// but for values below 2^-14 of the largest; 14 bits with a scale each 128 (64) values for four-bit weights. With AVX2
// int8 weights meet 15 bits with a scale each 64 values.
#include <math.h>

#include "linear.h"
#include "pool.h"
#include "rows.h"
#include "scratch.h"
#include "tiles.h"

namespace {

#ifndef GEMCUT_BLOCKED
constexpr int GROUP = 4;
#endif
constexpr int64_t CHUNK_BYTES = 96 << 10, AHEAD_BYTES = 12288;

// How many absmax values a unit may hold, and so how many the scratch of a row must.
constexpr int64_t MAX_SCALES = MAX_K / 32 + 32;

struct Call {
    const Plan* plan;
    Input in;
    int64_t m;
    bool pairs, digits, shorts;  // which arithmetic serves x
#ifdef GEMCUT_BLOCKED
    bool tiled;  // all of it is done by tiles.h
    Tiles tiles;
#endif
    void* out;
    int64_t out_stride;
    int64_t first_group[64];  // of each segment
};

// ---- x ------------------------------------------------------------------------------------------------------------

// Within each UNIT, value e of every group of eight, for e = 0 ... 7.
void split(const float* from, float* to, int64_t count) {
    for (int64_t start = 0; start < count; start += UNIT)
        for (int lane = 0; lane < W; ++lane)
            for (int e = 0; e < 8; ++e) to[start + e * W + lane] = from[start + lane * 8 + e];
}

#ifdef GEMCUT_SHORTS
// Each UNIT of x as integers of 14 bits and sign: the error is below 1e-4 of a unit's norm. False as unit_to_shorts.
bool to_shorts(const float* x, int64_t step, int16_t* shorts, float* scales) {
    for (int64_t u = 0; u < step; u += UNIT) {
        int16_t rounded[UNIT];
        if (!unit_to_shorts(x + u, 14, rounded, scales + u / UNIT)) return false;
        order_shorts(rounded, shorts + u);
    }
    return true;
}
#endif

#ifdef GEMCUT_DIGITS
// x as integers of 23 bits times a power of two, in three signed digits. False if the range of floats is too narrow.
bool to_digits(const float* x, int64_t step, int8_t* digits, int32_t* sums, float* scale) {
    const float largest = largest_of(x, step);
    if (!in_range(largest) || (largest != 0 && largest < 1e-30f)) return false;
    const int exponent = largest == 0 ? 0 : ilogbf(largest);
    const float factor = ldexpf(1.0f, 21 - exponent);
    int32_t total[3] = {0, 0, 0};
    for (int64_t i = 0; i < step; ++i) {
        // |q| <= 2^22, and adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the lower bits.
        const float shifted = x[i] * factor + 12582912.0f;
        int32_t q;
        memcpy(&q, &shifted, 4);
        q -= 0x4b400000;
        const int32_t low = int8_t(q), middle = int8_t((q - low) >> 8), high = (((q - low) >> 8) - middle) >> 8;
        digits[i] = int8_t(low), digits[step + i] = int8_t(middle), digits[2 * step + i] = int8_t(high);
        total[0] += low, total[1] += middle, total[2] += high;
    }
    for (int d = 0; d < 3; ++d) sums[d] = total[d];
    *scale = ldexpf(1.0f, exponent - 21);
    return true;
}
#endif

// Fills call.in from x; which forms are made depends on the segments. Returns false if one row's numbers forbid the
// integer arithmetic for all of these rows: then each row must be multiplied alone.
bool prepare(Call& call, const void* x, int64_t x_stride, bool x_is_bf16, int threads) {
    const Plan& plan = *call.plan;
#ifdef GEMCUT_BLOCKED
    call.tiled = serves(plan, x_is_bf16) && pack(call.tiles, plan, x, call.m, x_stride, x_is_bf16, threads);
    if (call.tiled) return true;
    if (call.m > 1 && serves(plan, x_is_bf16)) return false;
#else
    (void)threads;
#endif
    const int64_t k = plan.k, m = call.m, step = (k + 127) / 128 * 128, count = m * step;
    bool four_bit = false, int8 = false, bf16 = false, fp32 = false;
    for (int64_t s = 0; s < plan.count; ++s) {
        const int64_t kind = plan.segments[s].kind;
        four_bit |= kind == FOUR_BIT, int8 |= kind == INT8, bf16 |= kind == BF16, fp32 |= kind == FP32;
    }
    char* memory = static_cast<char*>(scratch(size_t(count) * 16 + size_t(m) * 64 + 4096));
    float* plain = reinterpret_cast<float*>(memory);
    float* split_plain = plain + count;
    float* short_scales = split_plain + count;
    uint16_t* bf16_rows = reinterpret_cast<uint16_t*>(short_scales + count / UNIT);
    int16_t* shorts = reinterpret_cast<int16_t*>(bf16_rows + count);
    int32_t* digit_sums = reinterpret_cast<int32_t*>(shorts + count);
    float* digit_scale = reinterpret_cast<float*>(digit_sums + 3 * m);
    int8_t* digits = reinterpret_cast<int8_t*>(digit_scale + m);
    call.in = {k, step, plain, split_plain, bf16_rows, shorts, short_scales, digits, digit_sums, digit_scale};
    call.pairs = call.digits = call.shorts = false;
#ifdef GEMCUT_PAIRS
    call.pairs = x_is_bf16;
#endif
    if (call.pairs && bf16) {
        for (int64_t i = 0; i < m; ++i) {
            memcpy(bf16_rows + i * step, static_cast<const uint16_t*>(x) + i * x_stride, size_t(k) * 2);
            memset(bf16_rows + i * step + k, 0, size_t(step - k) * 2);
        }
    }
    if (!int8 && !four_bit && !fp32 && call.pairs) return true;
    for (int64_t i = 0; i < m; ++i) {
        float* row = plain + i * step;
        if (x_is_bf16) {
            const uint16_t* source = static_cast<const uint16_t*>(x) + i * x_stride;
            for (int64_t j = 0; j < k; ++j) row[j] = from_bf16(source[j]);
        } else {
            memcpy(row, static_cast<const float*>(x) + i * x_stride, size_t(k) * 4);
        }
        for (int64_t j = k; j < step; ++j) row[j] = 0;
    }
    // NaN and infinity are no integers: a row with one, and one near the ends of fp32's range, is multiplied in fp32; so
    // are rows in fp32, whose last bits the integers lack.
    bool alike = true;
#ifdef GEMCUT_SHORTS
    call.shorts = four_bit && x_is_bf16;
    for (int64_t i = 0; i < m && call.shorts; ++i)
        call.shorts = to_shorts(plain + i * step, step, shorts + i * step, short_scales + i * (step / UNIT));
    alike &= call.shorts || !(four_bit && x_is_bf16);
#endif
#ifdef GEMCUT_DIGITS
    call.digits = int8 && x_is_bf16;
    for (int64_t i = 0; i < m && call.digits; ++i)
        call.digits = to_digits(plain + i * step, step, digits + 3 * i * step, digit_sums + 3 * i, digit_scale + i);
    alike &= call.digits || !(int8 && x_is_bf16);
#endif
    if (four_bit && !call.shorts) split(plain, split_plain, count);
    return alike;
}

// ---- weights ------------------------------------------------------------------------------------------------------

int64_t row_bytes(const Segment& segment, int64_t k) {
    return segment.kind == FOUR_BIT ? k / 2 : segment.kind == INT8 ? k : segment.kind == BF16 ? 2 * k : 4 * k;
}

// Absmax of blocks [first, first + count). May write up to 15 floats more.
void dequantize_block_absmax(const Segment& segment, int64_t first, int64_t count, float* out) {
    if (segment.nested_scale == nullptr) {
        memcpy(out, static_cast<const float*>(segment.absmax) + first, size_t(count) * 4);
        return;
    }
    const uint8_t* nested = static_cast<const uint8_t*>(segment.absmax);
    for (int64_t b = first; b < first + count;) {
        // As far as one nested scale reaches.
        const int64_t end = (b | 255) + 1 < first + count ? (b | 255) + 1 : first + count;
        dequantize_absmax(nested + b, end - b, segment.nested_map, segment.nested_planes, segment.nested_scale[b >> 8],
                      segment.nested_offset, out + (b - first));
        b = end;
    }
}

// Absmax of one row, `n` for each unit: blocks longer than a unit are repeated. Padded with zeros.
void row_absmax(const Segment& segment, int64_t row, int64_t k, int n, float* out) {
    const int64_t blocks = k / segment.block_size;
    float spare[MAX_K / 32 + 16];
    const int64_t repeat = segment.block_size * n > UNIT ? segment.block_size * n / UNIT : 1;
    dequantize_block_absmax(segment, row * blocks, blocks, repeat == 1 ? out : spare);
    float* end = out + blocks;
    if (repeat != 1) {
        end = out;
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t i = 0; i < repeat; ++i) *end++ = spare[b];
    }
    for (int i = 0; i < 4; ++i) *end++ = 0;
}

struct Rows {
    const Call* call;
    const Segment* segment;
    const uint8_t* data[GROUP];
    int64_t index[GROUP];
    int64_t ahead;
    const float* scales[GROUP];
    int per_unit;
};

template <int R, int M, int N>
void four_bit(const Rows& rows, int r, int first, float (*out)[MAX_M]) {
    const float* const* scales = rows.scales + r;
    const Segment& segment = *rows.segment;
#ifdef GEMCUT_SHORTS
    if (rows.call->shorts) {
        four_bit_shorts<R, M, N>(rows.data + r, scales, segment.short_codebook, rows.call->in, first, rows.ahead, out);
        const float factor = 1.0f / segment.short_factor;
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < M; ++j) out[i][first + j] *= factor;
        return;
    }
#endif
    four_bit_plain<R, M, N>(rows.data + r, scales, segment.codebook, rows.call->in, first, rows.ahead, out);
}

// R rows from row r of the group with M rows of x from row `first`.
template <int R, int M>
void multiply_rows(const Rows& rows, int r, int first, float (*out)[MAX_M]) {
    const Input& in = rows.call->in;
    const uint8_t* const* data = rows.data + r;
    switch (rows.segment->kind) {
        case FOUR_BIT:
            if (rows.per_unit == 1) four_bit<R, M, 1>(rows, r, first, out);
            else if (rows.per_unit == 2) four_bit<R, M, 2>(rows, r, first, out);
            else four_bit<R, M, 4>(rows, r, first, out);
            return;
        case INT8: {
#ifdef GEMCUT_DIGITS
            if (rows.call->digits) int8_digits<R, M>(data, in, first, rows.ahead, out);
            else
#endif
                rows_plain<R, M, int8_t>(data, in, first, rows.ahead, out);
            const float* absmax = static_cast<const float*>(rows.segment->absmax);
            for (int i = 0; i < R; ++i)
                for (int j = 0; j < M; ++j) out[i][first + j] *= absmax[rows.index[r + i]] / 127.0f;
            return;
        }
        case BF16:
#ifdef GEMCUT_PAIRS
            if (rows.call->pairs) return bf16_pairs<R, M>(data, in, first, rows.ahead, out);
#endif
            return rows_plain<R, M, uint16_t>(data, in, first, rows.ahead, out);
        default:
            return rows_plain<R, M, float>(data, in, first, rows.ahead, out);
    }
}

// As many rows at once as the registers hold.
#if defined(__AVX512F__)
constexpr int MANY = 4, SOME = 4, FEW = 2;
#elif defined(__aarch64__)
constexpr int MANY = 4, SOME = 4, FEW = 2;
#else
constexpr int MANY = 4, SOME = 2, FEW = 1;
#endif

template <int R, int M>
void in_turn(const Rows& rows, int first, float (*out)[MAX_M]) {
    for (int r = 0; r < GROUP; r += R) multiply_rows<R, M>(rows, r, first, out + r);
}

template <int64_t N>
void store(const Call& call, const Rows& rows, int valid, const float (*values)[N]) {
    for (int64_t m = 0; m < call.m; ++m)
        for (int r = 0; r < valid; ++r) {
            const int64_t place = m * call.out_stride + rows.segment->column + rows.index[r];
            if (call.plan->out_is_fp32) static_cast<float*>(call.out)[place] = values[r][m];
            else static_cast<uint16_t*>(call.out)[place] = to_bf16(values[r][m]);
        }
}

void groups(void* context, int64_t begin, int64_t end, int) {
    const Call& call = *static_cast<const Call*>(context);
    const Plan& plan = *call.plan;
    alignas(64) float scales[GROUP][MAX_SCALES];
    int64_t s = 0;
    for (int64_t g = begin; g < end; ++g) {
        while (s + 1 < plan.count && call.first_group[s + 1] <= g) ++s;
        const Segment& segment = plan.segments[s];
        const int64_t bytes = row_bytes(segment, plan.k), row = (g - call.first_group[s]) * GROUP;
        const int valid = int(segment.rows - row < GROUP ? segment.rows - row : GROUP);
        Rows rows;
        rows.call = &call, rows.segment = &segment, rows.per_unit = 1;
#ifdef GEMCUT_BLOCKED
        const bool in_sequence = segment.kind == BF16 && call.m == 1 && !call.tiled;
#else
        const bool in_sequence = segment.kind == BF16 && call.m == 1;
#endif
        rows.ahead = in_sequence ? 2048 : (AHEAD_BYTES / (GROUP * bytes) + 1) * GROUP * bytes;
        for (int r = 0; r < GROUP; ++r) {
            // A last group of fewer rows computes its last one again.
            rows.index[r] = row + (r < valid ? r : valid - 1);
            rows.data[r] = segment.data + rows.index[r] * bytes;
        }
        if (segment.kind == FOUR_BIT) {
            const int64_t block_absmax = segment.nested_scale == nullptr ? 4 : 1;
            const int64_t blocks = plan.k / segment.block_size;
            const uint8_t* next = static_cast<const uint8_t*>(segment.absmax) +
                                  (row * blocks + rows.ahead / bytes * blocks) * block_absmax;
            for (int64_t at = 0; at < GROUP * blocks * block_absmax; at += 64) prefetch(next + at);
            rows.per_unit = segment.block_size >= UNIT ? 1 : int(UNIT / segment.block_size);
            const bool as_they_are = segment.block_size <= UNIT && plan.k % UNIT == 0;
            const bool together = as_they_are && block_absmax == 1 && valid == GROUP;
            // Rows stand one after another: expanding all of them at once leaves the least of a vector unused.
            if (together) dequantize_block_absmax(segment, row * blocks, GROUP * blocks, scales[0]);
            for (int r = 0; r < GROUP; ++r) {
                rows.scales[r] = scales[r];
                if (together) rows.scales[r] = scales[0] + r * blocks;
                else if (as_they_are && block_absmax == 4)
                    rows.scales[r] = static_cast<const float*>(segment.absmax) + rows.index[r] * blocks;
                else row_absmax(segment, rows.index[r], plan.k, rows.per_unit, scales[r]);
            }
        }
#ifdef GEMCUT_BLOCKED
        if (call.tiled) {
            float absmax[GROUP] = {};
            for (int r = 0; r < GROUP && segment.kind == INT8; ++r)
                absmax[r] = static_cast<const float*>(segment.absmax)[rows.index[r]];
            Results results;
            multiply_group(call.tiles, segment, {rows.data, rows.scales, rows.per_unit, absmax, rows.ahead}, results);
            store(call, rows, valid, results);
            continue;
        }
#endif
        float values[GROUP][MAX_M];
        for (int64_t m = 0; m < call.m;) {
            const int64_t left = call.m - m;
            if (left >= 4) in_turn<FEW, 4>(rows, int(m), values), m += 4;
            else if (left == 3) in_turn<FEW, 3>(rows, int(m), values), m += 3;
            else if (left == 2) in_turn<SOME, 2>(rows, int(m), values), m += 2;
            else if (segment.kind == INT8) in_turn<FEW, 1>(rows, int(m), values), m += 1;
            else if (segment.kind == BF16) in_turn<1, 1>(rows, int(m), values), m += 1;
            else in_turn<MANY, 1>(rows, int(m), values), m += 1;
        }
        store(call, rows, valid, values);
    }
}

void multiply(const Plan* plan, const void* x, int64_t m, int64_t x_stride, bool x_is_bf16, void* out,
              int64_t out_stride, int threads) {
    Call call;
    call.plan = plan, call.m = m, call.out = out, call.out_stride = out_stride;
    if (!prepare(call, x, x_stride, x_is_bf16, threads) && m > 1) {
        // One request's NaN, or its very large numbers, must not change the bits of another: multiply each row alone.
        const int64_t x_bytes = x_stride * (x_is_bf16 ? 2 : 4), out_bytes = out_stride * (plan->out_is_fp32 ? 4 : 2);
        for (int64_t i = 0; i < m; ++i)
            multiply(plan, static_cast<const char*>(x) + i * x_bytes, 1, x_stride, x_is_bf16,
                     static_cast<char*>(out) + i * out_bytes, out_stride, threads);
        return;
    }
    int64_t total = 0, bytes = 0;
    for (int64_t s = 0; s < plan->count; ++s) {
        const Segment& segment = plan->segments[s];
        call.first_group[s] = total;
        total += (segment.rows + GROUP - 1) / GROUP;
        bytes += segment.rows * row_bytes(segment, plan->k);
    }
    const int64_t grain = total * CHUNK_BYTES / (bytes + 1) + 1;
    gemcut_parallel(groups, &call, total, grain, threads);
}

}  // namespace

// x: [m, k], rows `x_stride` apart, bf16 or fp32; out: [m, columns], rows `out_stride` apart. At most
// 64 segments; 1 <= k <= MAX_K, and for FOUR_BIT a multiple of its block_size, which is a power of two from 32 on.
GEMCUT_ENTRY(void, linear)
(const Plan* plan, const void* x, int64_t m, int64_t x_stride, int x_is_bf16, void* out, int64_t out_stride,
 int threads) {
    int64_t step = MAX_M;
#ifdef GEMCUT_BLOCKED
    if (serves(*plan, x_is_bf16 != 0)) step = rows_at_once(*plan, m);
#endif
    const int64_t x_bytes = x_stride * (x_is_bf16 ? 2 : 4), out_bytes = out_stride * (plan->out_is_fp32 ? 4 : 2);
    for (int64_t i = 0; i < m; i += step)
        multiply(plan, static_cast<const char*>(x) + i * x_bytes, m - i < step ? m - i : step, x_stride, x_is_bf16 != 0,
                 static_cast<char*>(out) + i * out_bytes, out_stride, threads);
}
