// gelu(gate) * up with the tanh approximation of GELU, in fp32, rounded once: bf16 [m, 2 * width] -> bf16 [m, width].

struct Geglu {
  const u16* gate_up;
  void* out;             // rows, or the order of ordered.cuh in `groups` groups
  int width, m, groups;
};

// Eight columns of one row.
__device__ __forceinline__ uint4 gated8(const Geglu& p, size_t row, int column) {
  const u16* const from = p.gate_up + row * 2 * p.width + column;
  float gate[8], up[8];
  unpack8(__ldcs(reinterpret_cast<const uint4*>(from)), gate);
  unpack8(__ldcs(reinterpret_cast<const uint4*>(from + p.width)), up);
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
  *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + (size_t)blockIdx.y * p.width + column) = gated8(p, blockIdx.y, column);
}

extern "C" __global__ void __launch_bounds__(256) geglu_ordered(Geglu p) {
  const OrderedPiece at = ordered_piece((p.width + 255) / 256 * 4, p.groups);
  next_kernel_may_start();
  previous_kernels_done();
  if (!at.inside || at.row >= p.m) return;
  uint4 v[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = at.column + half * 8;
    v[half] = column < p.width ? gated8(p, at.row, column) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) store_ordered(static_cast<u32*>(p.out), p.groups, at.row, at.column + half * 8, v[half]);
}
