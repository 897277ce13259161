// Computes: what linear.cpp and gemm.cpp are given: segments (matrices of the same inputs) and their plan
// Shapes: a Segment is one matrix [rows, k]; its results are columns [column, column + rows) of the output
// Runs: filled by gemcut/kernels/cpu/linear.py, which mirrors the structs
// Schedule: none: a declaration
// Invariants: k at most MAX_K; FOUR_BIT blocks are a power of two from 32 on and divide k
#pragma once
#include "gemcut.h"

enum Kind : int64_t { FOUR_BIT = 0, INT8 = 1, BF16 = 2, FP32 = 3 };

// One matrix [rows, k]; its results stand in columns [column, column + rows) of the output.
struct Segment {
    int64_t kind, rows, column;
    const uint8_t* data;         // packed values, row after row
    const void* absmax;          // FOUR_BIT: fp32 or (nested) uint8, one a block; INT8: fp32, one a row
    const float* nested_scale;   // null: absmax is fp32
    const float* nested_map;     // 256 values
    const uint8_t* nested_planes;  // their first bytes, all second bytes, third, fourth
    const float* codebook;          // FOUR_BIT: 16 values
    const int16_t* short_codebook;  // the same times short_factor, rounded to integers of 14 bits with sign
    int64_t block_size;
    float nested_offset, short_factor;
};

struct Plan {
    const Segment* segments;
    int64_t count, k;
    int64_t out_is_fp32;  // else bf16
};

// The largest k, which bounds scratch memory on the stack and 32-bit sums.
constexpr int64_t MAX_K = 65536;
// The most rows of x.
constexpr int64_t MAX_M = 8;
