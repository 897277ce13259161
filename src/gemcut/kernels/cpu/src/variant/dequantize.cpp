// Computes: blocks of the GGUF file format to bf16 or fp32: scale * code, or scale * code - minimum
// Shapes: blocks of 32 values (one scale) or 256 (one scale, and a small integer for each 16 or 32 values)
// Runs: gemcut/kernels/cpu/dequantize.py; threads by blocks
// Schedule: elementwise; loops that compilers vectorize
// Invariants: fp32 with a rounding after each operation, as the gguf library computes: the same bits
//
// A scale, minimum or absmax is little-endian fp16.
#include "pool.h"
#include "simd.h"

namespace {

// The numbers of the types in a file.
enum Type { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
            IQ4_NL = 20, IQ4_XS = 23 };

// The codes that the 16 nibbles of IQ4 stand for.
const int8_t IQ4_CODES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline float from_fp16(const uint8_t* p) {
    const uint32_t half = uint32_t(p[0]) | uint32_t(p[1]) << 8, fraction = half & 0x3ff, exponent = half >> 10 & 0x1f;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = float(fraction) * 0x1p-24f;
        memcpy(&bits, &value, 4);
    } else {
        bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    }
    bits |= (half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

inline void put(float* out, float value) { *out = value; }
inline void put(uint16_t* out, float value) { *out = to_bf16(value); }

template <int n, typename Out>
inline void scaled(Out* __restrict out, const int8_t* __restrict codes, float scale) {
    for (int i = 0; i < n; ++i) put(out + i, scale * float(codes[i]));
}
template <int n, typename Out>
inline void scaled(Out* __restrict out, const int8_t* __restrict codes, float scale, float added) {
    for (int i = 0; i < n; ++i) put(out + i, scale * float(codes[i]) + added);
}

// The nibbles of 16 bytes: all low ones, then all high ones.
inline void nibbles(int8_t* __restrict to, const uint8_t* __restrict from) {
    for (int i = 0; i < 16; ++i) {
        to[i] = int8_t(from[i] & 15);
        to[i + 16] = int8_t(from[i] >> 4);
    }
}

// The fifth bits of 32 codes, one after the other in four bytes.
inline void fifth_bits(int8_t* codes, const uint8_t* from) {
    const uint32_t bits = from[0] | from[1] << 8 | from[2] << 16 | uint32_t(from[3]) << 24;
    for (int i = 0; i < 32; ++i) codes[i] = int8_t(codes[i] | int(bits >> i & 1) << 4);
}

inline void look_up(int8_t* codes) {
    for (int i = 0; i < 32; ++i) codes[i] = IQ4_CODES[codes[i]];
}

// Scale and minimum of part j of a Q4_K or Q5_K block, six bits each: 8 pairs in 12 bytes.
inline void six_bits(const uint8_t* p, int j, float& scale, float& minimum) {
    if (j < 4) {
        scale = float(p[j] & 63);
        minimum = float(p[j + 4] & 63);
    } else {
        scale = float((p[j + 4] & 15) | (p[j - 4] >> 2 & 48));
        minimum = float(p[j + 4] >> 4 | (p[j] >> 2 & 48));
    }
}

// One block each: its bytes, and where its values go.
template <int type, typename Out>
inline void block(const uint8_t* __restrict p, Out* __restrict out) {
    int8_t codes[32];
    if (type == Q4_0 || type == IQ4_NL) {
        nibbles(codes, p + 2);
        if (type == IQ4_NL) look_up(codes);
        for (int i = 0; type == Q4_0 && i < 32; ++i) codes[i] = int8_t(codes[i] - 8);
        scaled<32>(out, codes, from_fp16(p));
    } else if (type == Q4_1) {
        nibbles(codes, p + 4);
        scaled<32>(out, codes, from_fp16(p), from_fp16(p + 2));
    } else if (type == Q5_0) {
        nibbles(codes, p + 6);
        fifth_bits(codes, p + 2);
        for (int i = 0; i < 32; ++i) codes[i] = int8_t(codes[i] - 16);
        scaled<32>(out, codes, from_fp16(p));
    } else if (type == Q5_1) {
        nibbles(codes, p + 8);
        fifth_bits(codes, p + 4);
        scaled<32>(out, codes, from_fp16(p), from_fp16(p + 2));
    } else if (type == Q8_0) {
        scaled<32>(out, reinterpret_cast<const int8_t*>(p + 2), from_fp16(p));
    } else if (type == Q2_K) {
        const float scale = from_fp16(p + 80), minimum = from_fp16(p + 82);
        for (int j = 0; j < 8; ++j) {
            const uint8_t* two = p + 16 + j / 4 * 32;
            for (int i = 0; i < 32; ++i) codes[i] = int8_t(two[i] >> (j % 4 * 2) & 3);
            for (int h = 0; h < 2; ++h) {
                const float part = float(p[2 * j + h] & 15), least = float(p[2 * j + h] >> 4);
                scaled<16>(out + 32 * j + 16 * h, codes + 16 * h, scale * part, -(minimum * least));
            }
        }
    } else if (type == Q3_K) {
        const uint8_t *high = p, *small = p + 96;
        const float scale = from_fp16(p + 108);
        for (int j = 0; j < 8; ++j) {
            const uint8_t* two = p + 32 + j / 4 * 32;
            for (int i = 0; i < 32; ++i) codes[i] = int8_t((two[i] >> (j % 4 * 2) & 3) - (high[i] >> j & 1 ? 0 : 4));
            for (int h = 0; h < 2; ++h) {
                const int part = 2 * j + h;
                const int low = small[part % 8] >> (part / 8 * 4) & 15, top = small[8 + part % 4] >> (part / 4 * 2) & 3;
                scaled<16>(out + 16 * part, codes + 16 * h, scale * float((low | top << 4) - 32));
            }
        }
    } else if (type == Q4_K || type == Q5_K) {
        const float scale = from_fp16(p), minimum = from_fp16(p + 2);
        const uint8_t* four = p + (type == Q4_K ? 16 : 48);
        for (int j = 0; j < 8; ++j) {
            for (int i = 0; i < 32; ++i) codes[i] = int8_t(four[j / 2 * 32 + i] >> (j % 2 * 4) & 15);
            for (int i = 0; type == Q5_K && i < 32; ++i) codes[i] = int8_t(codes[i] | (p[16 + i] >> j & 1) << 4);
            float part, least;
            six_bits(p + 4, j, part, least);
            scaled<32>(out + 32 * j, codes, scale * part, -(minimum * least));
        }
    } else if (type == Q6_K) {
        const int8_t* parts = reinterpret_cast<const int8_t*>(p + 192);
        const float scale = from_fp16(p + 208);
        for (int j = 0; j < 8; ++j) {
            const uint8_t *low = p + j / 4 * 64 + j % 2 * 32, *high = p + 128 + j / 4 * 32;
            const int shift = j / 2 % 2 * 4, two = j % 4 * 2;
            for (int i = 0; i < 32; ++i) codes[i] = int8_t(((low[i] >> shift & 15) | (high[i] >> two & 3) << 4) - 32);
            for (int h = 0; h < 2; ++h)
                scaled<16>(out + 32 * j + 16 * h, codes + 16 * h, scale * float(parts[2 * j + h]));
        }
    } else if (type == IQ4_XS) {
        const float scale = from_fp16(p);
        const int high = p[2] | p[3] << 8;
        for (int j = 0; j < 8; ++j) {
            nibbles(codes, p + 8 + 16 * j);
            look_up(codes);
            const int part = (p[4 + j / 2] >> (j % 2 * 4) & 15) | (high >> (2 * j) & 3) << 4;
            scaled<32>(out + 32 * j, codes, scale * float(part - 32));
        }
    }
}

struct Blocks {
    const uint8_t* data;
    void* out;
};

template <int type, int values, int bytes, typename Out>
void task(void* context, int64_t begin, int64_t end, int) {
    const Blocks& blocks = *static_cast<const Blocks*>(context);
    for (int64_t i = begin; i < end; ++i)
        block<type>(blocks.data + i * bytes, static_cast<Out*>(blocks.out) + i * values);
}

template <int type, int values, int bytes>
inline void all(Blocks blocks, int64_t count, int out_is_fp32, int threads) {
    gemcut_parallel(
        out_is_fp32 ? task<type, values, bytes, float> : task<type, values, bytes, uint16_t>, &blocks, count,
        16384 / values, threads);
}

}  // namespace

// `count` blocks of a type at `data` to as many times its values at `out`. Returns 0 for a type that is not here.
GEMCUT_ENTRY(int, dequantize)(int type, const uint8_t* data, int64_t count, void* out, int out_is_fp32, int threads) {
    const Blocks blocks{data, out};
    switch (type) {
        case Q4_0: all<Q4_0, 32, 18>(blocks, count, out_is_fp32, threads); return 1;
        case Q4_1: all<Q4_1, 32, 20>(blocks, count, out_is_fp32, threads); return 1;
        case Q5_0: all<Q5_0, 32, 22>(blocks, count, out_is_fp32, threads); return 1;
        case Q5_1: all<Q5_1, 32, 24>(blocks, count, out_is_fp32, threads); return 1;
        case Q8_0: all<Q8_0, 32, 34>(blocks, count, out_is_fp32, threads); return 1;
        case Q2_K: all<Q2_K, 256, 84>(blocks, count, out_is_fp32, threads); return 1;
        case Q3_K: all<Q3_K, 256, 110>(blocks, count, out_is_fp32, threads); return 1;
        case Q4_K: all<Q4_K, 256, 144>(blocks, count, out_is_fp32, threads); return 1;
        case Q5_K: all<Q5_K, 256, 176>(blocks, count, out_is_fp32, threads); return 1;
        case Q6_K: all<Q6_K, 256, 210>(blocks, count, out_is_fp32, threads); return 1;
        case IQ4_NL: all<IQ4_NL, 32, 18>(blocks, count, out_is_fp32, threads); return 1;
        case IQ4_XS: all<IQ4_XS, 256, 136>(blocks, count, out_is_fp32, threads); return 1;
    }
    return 0;
}
