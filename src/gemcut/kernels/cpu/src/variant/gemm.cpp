// Computes: y = x [W0; W1; ...]^T for many rows of x: prefill, and decode steps of large batches
// Shapes: x bf16 [m, k]; segments of linear.h in FOUR_BIT, INT8 or BF16; y bf16 or fp32 [m, columns]
// Runs: gemcut/kernels/cpu/linear.py from a few rows on; threads by panels of weights' rows
// Schedule: blocked GEMM (GotoBLAS): panels dequantized into L2, packed x, micro-kernels of gemm_block.h
// Invariants: a panel belongs to one thread, so the order of a sum depends on nothing but k
//
// Weights are dequantized a panel at a time, 256 inputs of up to MAX_PANEL_ROWS rows, into memory that stays in L2. A
// block of 32 of its rows (16 KiB) stays in L1 while all rows of x pass by. Sums of a panel stay in L2, too. Every
// weight is dequantized once for every CHUNK rows of x.
#include <stdlib.h>

#include "gemm_block.h"
#include "linear.h"
#include "pool.h"

#if defined(__AVX2__)

namespace {

// Rows of x at once. Their sums for the largest panel, the panel and 256 inputs of x have to share the L2
//: processors with AMX have two megabytes of it, others one.
#if defined(__AMX_BF16__)
constexpr int64_t CHUNK = 512, MAX_PANEL_ROWS = 256;
#else
constexpr int64_t CHUNK = 512, MAX_PANEL_ROWS = 192;
#endif

struct Call {
    const Plan* plan;
    const uint16_t* x;
    int64_t m, x_stride, strips, padded_k;
    Element* packed;
    void* out;
    int64_t out_stride, panel_rows;
};

// Memory of the calling thread, kept for its next call: [0] for packed x, [1] for a panel and its sums.
struct Scratch {
    void* memory[2];
    size_t size[2];
    ~Scratch() { free(memory[0]), free(memory[1]); }
};

void* scratch(int which, size_t size) {
    static thread_local Scratch kept{{nullptr, nullptr}, {0, 0}};
    if (kept.size[which] < size) {
        free(kept.memory[which]);
        if (posix_memalign(&kept.memory[which], 4096, size)) abort();
        kept.size[which] = size;
    }
    return kept.memory[which];
}

#if defined(__AVX512F__)
// Turns 16 rows of 16 words into 16 columns.
inline void transpose(__m512i (&v)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Now v[4 a + c] holds in its quarter q the words of rows 4 a ... 4 a + 3 in column 4 q + c.
    for (int c = 0; c < 4; ++c) {
        t[c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
        t[12 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; ++c) {
        v[c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);
        v[8 + c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xdd);
        v[4 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
        v[12 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xdd);
    }
}

inline __m256i narrow(__m512 values) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(values);
#else
    const __m512i words = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(words, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(words, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, words, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
#endif

// One strip of 16 rows of x for a task's items [begin, end): rows beyond m and inputs beyond k are zero.
void pack(void* context, int64_t begin, int64_t end, int) {
    const Call& call = *static_cast<const Call*>(context);
    const int64_t k = call.plan->k;
    for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t rows = call.m - strip * TILE < TILE ? call.m - strip * TILE : TILE;
        const uint16_t* from = call.x + strip * TILE * call.x_stride;
        Element* to = call.packed + strip * TILE * call.padded_k;
#if defined(__AVX512BF16__)
        for (int64_t j = 0; j < call.padded_k; j += 32) {
            const int64_t left = k - j;
            const __mmask32 mask = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
            __m512i v[16];
            for (int r = 0; r < TILE; ++r)
                v[r] = r < rows ? _mm512_maskz_loadu_epi16(mask, from + r * call.x_stride + j) : _mm512_setzero_si512();
            transpose(v);
            for (int r = 0; r < TILE; ++r) _mm512_store_si512(to + j * TILE + r * 32, v[r]);
        }
#else
        for (int64_t j = 0; j < call.padded_k; ++j)
            for (int r = 0; r < TILE; ++r)
                to[j * TILE + r] = r < rows && j < k ? from_bf16(from[r * call.x_stride + j]) : 0.0f;
#endif
    }
}

// A tile of sums [16 weights' rows][16 rows of x] to the output, of which `rows` by `columns` exist.
void put_tile(const float* sums, void* out, int64_t place, int64_t stride, int rows, int columns, bool fp32) {
#if defined(__AVX512F__)
    __m512i v[16];
    for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(sums + i * TILE);
    transpose(v);
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    for (int r = 0; r < rows; ++r) {
        const __m512 values = _mm512_castsi512_ps(v[r]);
        if (fp32) _mm512_mask_storeu_ps(static_cast<float*>(out) + place + r * stride, mask, values);
        else _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + place + r * stride, mask, narrow(values));
    }
#else
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) {
            const float value = sums[c * TILE + r];
            if (fp32) static_cast<float*>(out)[place + r * stride + c] = value;
            else static_cast<uint16_t*>(out)[place + r * stride + c] = to_bf16(value);
        }
#endif
}

int64_t panels_of(const Segment& segment, int64_t panel_rows) { return (segment.rows + panel_rows - 1) / panel_rows; }

void one_panel(const Call& call, const Segment& segment, int64_t row) {
    const Plan& plan = *call.plan;
    const int64_t rows = segment.rows - row < call.panel_rows ? segment.rows - row : call.panel_rows;
    const int64_t padded_rows = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    const size_t panel_size = size_t(MAX_PANEL_ROWS) * PANEL_K * sizeof(Element);
    char* memory = static_cast<char*>(scratch(1, panel_size + size_t(MAX_PANEL_ROWS) * CHUNK * sizeof(float)));
    Element* panel = reinterpret_cast<Element*>(memory);
    float* sums = reinterpret_cast<float*>(memory + panel_size);
    const int64_t row_step = call.strips * TILE_SUMS, strip_step = TILE * call.padded_k;
    begin_blocks();
    for (int64_t first = 0; first < plan.k; first += PANEL_K) {
        const int64_t count = plan.k - first < PANEL_K ? plan.k - first : PANEL_K, padded = (count + 31) / 32 * 32;
        dequantize_panel(segment, row, rows, padded_rows, plan.k, first, count, panel);
        for (int64_t r = 0; r < padded_rows; r += BLOCK_ROWS)
            for (int64_t strip = 0; strip < call.strips; strip += 2)
                block(panel + r * PANEL_K, call.packed + strip * strip_step + first * TILE,
                      call.strips - strip >= 2 ? 2 : 1, strip_step, padded, first == 0,
                      sums + r / TILE * row_step + strip * TILE_SUMS, row_step);
    }
    end_blocks();
    for (int64_t strip = 0; strip < call.strips; ++strip) {
        const int64_t m = strip * TILE, existing = call.m - m < TILE ? call.m - m : TILE;
        for (int64_t r = 0; r < rows; r += TILE) {
            const int64_t columns = rows - r < TILE ? rows - r : TILE;
            put_tile(sums + r / TILE * row_step + strip * TILE_SUMS, call.out,
                     m * call.out_stride + segment.column + row + r, call.out_stride, int(existing), int(columns),
                     plan.out_is_fp32 != 0);
        }
    }
}

void panels(void* context, int64_t begin, int64_t end, int) {
    const Call& call = *static_cast<const Call*>(context);
    for (int64_t p = begin; p < end; ++p) {
        int64_t s = 0, place = p;
        for (int64_t here; place >= (here = panels_of(call.plan->segments[s], call.panel_rows)); ++s) place -= here;
        one_panel(call, call.plan->segments[s], place * call.panel_rows);
    }
}

int64_t count_panels(const Plan& plan, int64_t panel_rows) {
    int64_t total = 0;
    for (int64_t s = 0; s < plan.count; ++s) total += panels_of(plan.segments[s], panel_rows);
    return total;
}

// The largest panel that leaves no thread much without work.
int64_t choose_panel_rows(const Plan& plan, int threads) {
    int64_t best = 0, best_time = 0;
    for (int64_t rows = MAX_PANEL_ROWS; rows >= BLOCK_ROWS; rows -= BLOCK_ROWS) {
        const int64_t time = (count_panels(plan, rows) + threads - 1) / threads * rows;
        if (best == 0 || time * 100 < best_time * 97) best = rows, best_time = time;
    }
    return best;
}

}  // namespace

// x: bf16 [m, k], rows `x_stride` apart; out: [m, columns], rows `out_stride` apart. FOUR_BIT, INT8 and BF16 segments as
// for linear.
GEMCUT_ENTRY(void, gemm)
(const Plan* plan, const uint16_t* x, int64_t m, int64_t x_stride, void* out, int64_t out_stride, int threads) {
    Call call;
    call.plan = plan, call.x_stride = x_stride, call.out_stride = out_stride;
    call.padded_k = (plan->k + 31) / 32 * 32;
    call.panel_rows = choose_panel_rows(*plan, threads);
    for (int64_t first = 0; first < m; first += CHUNK) {
        call.m = m - first < CHUNK ? m - first : CHUNK;
        call.strips = (call.m + TILE - 1) / TILE;
        call.packed = static_cast<Element*>(scratch(0, size_t(call.strips) * TILE * call.padded_k * sizeof(Element)));
        call.x = x + first * x_stride;
        call.out = static_cast<char*>(out) + first * out_stride * (plan->out_is_fp32 ? 4 : 2);
        gemcut_parallel(pack, &call, call.strips, 1, threads);
        gemcut_parallel(panels, &call, count_panels(*plan, call.panel_rows), 1, threads);
    }
}

#endif
