// int8 rows to the bf16 matrix they stand for: code times (row's largest magnitude / 127) in fp32, rounded once.

struct Decode {
  const u8* codes;        // [n, k]
  const float* scales;    // [n]: largest magnitude / 127
  u16* out;               // [n, k]
  int k;
};

extern "C" __global__ void __launch_bounds__(256) int8_decode(Decode p) {
  const int column = (blockIdx.x * 256 + threadIdx.x) * 16;
  const size_t row = blockIdx.y;
  previous_kernels_done();
  next_kernel_may_start();
  if (column >= p.k) return;
  const float scale = p.scales[row];
  const uint4 packed = __ldcs(reinterpret_cast<const uint4*>(p.codes + row * p.k + column));
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
  u32 pairs[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const u32 word = words[j / 2] >> (j % 2 * 16);
    pairs[j] = pack_bf16((float)(signed char)word * scale, (float)(signed char)(word >> 8) * scale);
  }
  uint4* const to = reinterpret_cast<uint4*>(p.out + row * p.k + column);
  to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}
