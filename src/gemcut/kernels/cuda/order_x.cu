// x to the order that gemm.cuh multiplies in: [blocks of 64 columns, groups of 8 rows, 8 cores along k, 8 rows, 16 bytes].
// Core 2 i + h of a block holds columns 16 q + 4 i + 2 h and the next, q from 0 to 3: what matrix instruction i wants there.

struct Order {
  const u8* x;        // bf16 [m, k], rows x_stride bytes apart
  u32* ordered;
  int m, k, x_stride, blocks, groups;
};

extern "C" __global__ void __launch_bounds__(256) order_x(Order p) {
  const int piece = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;   // a warp a piece: eight rows of 64 columns
  next_kernel_may_start();
  previous_kernels_done();
  if (piece >= p.blocks * p.groups) return;
  const int row = piece % p.groups * 8 + lane / 4, column = piece / p.groups * 64 + lane % 4 * 16;
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  if (row < p.m && column < p.k) {
    const uint4* const from = reinterpret_cast<const uint4*>(p.x + (size_t)row * p.x_stride + column * 2);
    low = from[0], high = from[1];
  }
  u32* const to = p.ordered + (size_t)piece * 256 + lane;
  to[0] = low.x, to[32] = low.y, to[64] = low.z, to[96] = low.w;
  to[128] = high.x, to[160] = high.y, to[192] = high.z, to[224] = high.w;
}
