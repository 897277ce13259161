// x to the order of ordered.cuh.

struct Order {
  const u8* x;        // bf16 [m, k], rows x_stride bytes apart
  u32* ordered;
  int m, k, x_stride, blocks, groups;
};

extern "C" __global__ void __launch_bounds__(256) order_x(Order p) {
  const OrderedPiece at = ordered_piece(p.blocks, p.groups);
  next_kernel_may_start();
  previous_kernels_done();
  if (!at.inside || at.row >= p.m) return;
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  if (at.column < p.k) {
    const uint4* const from = reinterpret_cast<const uint4*>(p.x + (size_t)at.row * p.x_stride + at.column * 2);
    low = from[0], high = from[1];
  }
  store_ordered(p.ordered, p.groups, at.row, at.column, low);
  store_ordered(p.ordered, p.groups, at.row, at.column + 8, high);
}
