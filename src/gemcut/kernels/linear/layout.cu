// Computes: rows of x copied to the layout of layout.cuh
// Shapes: x bf16 [m, k] -> bf16 [blocks of 64 columns, groups of 8 rows, 8, 8, 8]
// Runs: linear/layout.py, for x that no norm or GeGLU has written in this layout
// Schedule: elementwise; a warp writes eight rows of 64 columns, whole lines of 128 bytes
// Invariants: columns past k are written as zeros; rows past m are left as they are

struct Order {
  const u8* x;        // bf16 [m, k], rows x_stride bytes apart
  u32* ordered;
  int m, k, x_stride, blocks, groups;
};

// A lane has 16 columns of a row.
extern "C" __global__ void __launch_bounds__(256) order_x(Order p) {
  const int strip = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int row = strip % p.groups * 8 + lane / 4, column = strip / p.groups * 64 + lane % 4 * 16;
  next_kernel_may_start();
  previous_kernels_done();
  if (strip >= p.blocks * p.groups || row >= p.m) return;
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  if (column < p.k) {
    const uint4* const from = reinterpret_cast<const uint4*>(p.x + (size_t)row * p.x_stride + column * 2);
    low = from[0], high = from[1];
  }
  store_ordered(p.ordered, p.groups, row, column, low);
  store_ordered(p.ordered, p.groups, row, column + 8, high);
}
