// Computes: gelu(gate) * up with the tanh approximation of GELU (GEGLU, arXiv 2002.05202), in fp32, rounded once
// Shapes: bf16 [m, 2 width], gate before up -> bf16 [m, width], as rows or in the layout of linear/layout.cuh
// Runs: rowwise/geglu.py, between gate+up and down wherever gated_gemm does not compute both in one launch
// Schedule: elementwise; geglu: eight columns a thread; geglu_ordered: a warp has 64 columns of eight rows
// Invariants: the result is right where exp overflows or vanishes; padding columns of the layout are zeros

struct Geglu {
  const u16* gate_up;
  void* out;             // rows, or the layout of layout.cuh in `groups` groups
  int width, m, groups;
};

// Eight columns of one row.
__device__ __forceinline__ uint4 gated8(const uint4& gates, const uint4& ups) {
  float gate[8], up[8];
  unpack8(gates, gate);
  unpack8(ups, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)); both ends are right when exp overflows or vanishes
    const float g = gate[i], u = 0.7978845608028654f * (g + 0.044715f * g * g * g);
    gate[i] = g / (1.f + __expf(-2.f * u)) * up[i];
  }
  return pack8(gate);
}

extern "C" __global__ void __launch_bounds__(256) geglu(Geglu p) {
  const int column = (blockIdx.x * 256 + threadIdx.x) * 8;
  next_kernel_may_start();
  previous_kernels_done();
  if (column >= p.width) return;
  const u16* const from = p.gate_up + (size_t)blockIdx.y * 2 * p.width + column;
  const uint4 gates = __ldcs(reinterpret_cast<const uint4*>(from)), ups = __ldcs(reinterpret_cast<const uint4*>(from + p.width));
  *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + (size_t)blockIdx.y * p.width + column) = gated8(gates, ups);
}

// A warp reads two halves of four rows, whole lines at a time. Neighbouring warps and blocks have neighbouring columns. (Reading half
// a sector at a time with __ldcs fetches it from memory twice.)
extern "C" __global__ void __launch_bounds__(256) geglu_ordered(Geglu p) {
  const int blocks = (p.width + 255) / 256 * 4, wide = (blocks + 7) / 8, lane = threadIdx.x % 32;
  const int block = blockIdx.x % wide * 8 + threadIdx.x / 32, column = block * 64 + lane % 8 * 8;
  const int first_row = blockIdx.x / wide * 8 + lane / 8;
  next_kernel_may_start();
  previous_kernels_done();
  if (block >= blocks) return;
  uint4 v[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 4;
    v[half] = make_uint4(0, 0, 0, 0);
    if (row < p.m && column < p.width) {
      const uint4* const from = reinterpret_cast<const uint4*>(p.gate_up + (size_t)row * 2 * p.width + column);
      v[half] = gated8(from[0], from[p.width / 8]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 4;
    if (row < p.m) store_ordered(static_cast<u32*>(p.out), p.groups, row, column, v[half]);
  }
}
