// gelu(gate) * up with the tanh approximation of GELU, in fp32, rounded once: bf16 [m, 2 * width] -> bf16 [m, width].

struct Geglu {
  const u16* gate_up;
  u16* out;
  int width;
};

extern "C" __global__ void __launch_bounds__(256) geglu(Geglu p) {
  const int column = (blockIdx.x * 256 + threadIdx.x) * 8;
  next_kernel_may_start();
  previous_kernels_done();
  if (column >= p.width) return;
  const u16* const from = p.gate_up + (size_t)blockIdx.y * 2 * p.width + column;
  float gate[8], up[8];
  unpack8(__ldcs(reinterpret_cast<const uint4*>(from)), gate);
  unpack8(__ldcs(reinterpret_cast<const uint4*>(from + p.width)), up);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)); both ends are right when exp overflows or vanishes
    const float g = gate[i], u = 0.7978845608028654f * (g + 0.044715f * g * g * g);
    gate[i] = g / (1.f + __expf(-2.f * u)) * up[i];
  }
  *reinterpret_cast<uint4*>(p.out + (size_t)blockIdx.y * p.width + column) = pack8(gate);
}
