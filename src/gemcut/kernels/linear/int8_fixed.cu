// Up to eight rows of x against int8 rows in warps of fixed columns. Compiled after int8_gemv.cu and fixed.cuh.

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
int8_fixed(Problem problem, Format format) { run_fixed_rows<Format, BLOCK_WARPS, FIXED_STEPS, FIXED_ROWS / 8>(problem, format); }
