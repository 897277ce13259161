// Computes: where the fused GEMM (gemm.cuh) reads a value of x: the interleaved layout of x
// Shapes: [blocks of 64 columns, groups of 8 rows, 8 cores along k, 8 rows, 16 bytes] of bf16
// Runs: order_x, norm_add, norm_embed and geglu_ordered, which write this layout
// Schedule: wgmma's core matrices without swizzle, K-major (PTX ISA, wgmma matrix descriptors)
// Invariants: core 2 i + h of a block holds columns 16 q + 4 i + 2 h and the next, q from 0 to 3

// Stores eight columns of one row, from `column` (a multiple of eight) on.
__device__ __forceinline__ void store_ordered(u32* ordered, int groups, int row, int column, const uint4& v) {
  const int block = column / 64, quad = column % 64 / 16, first_core = column % 16 / 8 * 4;
  u32* const to = ordered + ((size_t)block * groups + row / 8) * 256 + first_core * 32 + row % 8 * 4 + quad;
  to[0] = v.x, to[32] = v.y, to[64] = v.z, to[96] = v.w;
}
