// Computes: int8 weights to the bf16 matrix they stand for: code times (row's largest magnitude / 127), rounded once
// Shapes: int8 [n, k], scales fp32 [n] -> bf16 [n, k]; k a multiple of 8, n at most 65535
// Runs: linear/cuda.py, before cuBLAS or gated_gemm multiplies many rows
// Schedule: elementwise, one block row a row of W, 16 values a thread
// Invariants: the product is fp32 and is rounded once

struct Dequant {
  const u8* codes;        // [n, k]
  const float* scales;    // [n]: largest magnitude / 127
  u16* out;               // [n, k]
  int k;
};

extern "C" __global__ void __launch_bounds__(256) int8_dequant(Dequant p) {
  const int column = (blockIdx.x * 512 + threadIdx.x) * 8;   // and 2048 columns further on
  const size_t row = blockIdx.y;
  previous_kernels_done();
  next_kernel_may_start();
  const float scale = p.scales[row];
  uint2 packed[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (column + i * 2048 < p.k) packed[i] = __ldcs(reinterpret_cast<const uint2*>(p.codes + row * p.k + column + i * 2048));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (column + i * 2048 >= p.k) return;
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 word = (j < 2 ? packed[i].x : packed[i].y) >> (j % 2 * 16);
      pairs[j] = pack_bf16((float)(signed char)word * scale, (float)(signed char)(word >> 8) * scale);
    }
    *reinterpret_cast<uint4*>(p.out + row * p.k + column + i * 2048) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}
