// The order of x that gemm.cuh multiplies in: [blocks of 64 columns, groups of 8 rows, 8 cores along k, 8 rows, 16 bytes].
// Core 2 i + h of a block holds columns 16 q + 4 i + 2 h and the next, q from 0 to 3: what matrix instruction i wants there.

// Eight columns of one row, from `column` (a multiple of eight) on, to their places.
__device__ __forceinline__ void store_ordered(u32* ordered, int groups, int row, int column, const uint4& v) {
  const int block = column / 64, quad = column % 64 / 16, first_core = column % 16 / 8 * 4;
  u32* const to = ordered + ((size_t)block * groups + row / 8) * 256 + first_core * 32 + row % 8 * 4 + quad;
  to[0] = v.x, to[32] = v.y, to[64] = v.z, to[96] = v.w;
}
