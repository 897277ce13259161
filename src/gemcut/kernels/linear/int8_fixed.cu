// Computes: y = x W^T of small int8 matrices, each warp with fixed columns (fixed.cuh)
// Shapes: x bf16 [m, k], m from 1 to 8; W int8 [n, k] row-major, scales fp32 [n]; y bf16 or fp32 [m, n]
// Runs: linear/gemv.py where plan_fixed() takes it: 28 to 36 k_blocks of 128 columns
// Schedule: GEMV, x register-stationary, two k_blocks a warp; partial sums meet in shared memory
// Invariants: no split-K: a block has all columns of its tiles. Compiled after int8_gemv.cu and fixed.cuh

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
int8_fixed(Problem problem, Format format) { gemv_fixed_rows<Format, BLOCK_WARPS, FIXED_K_BLOCKS, FIXED_ROWS / 8>(problem, format); }
