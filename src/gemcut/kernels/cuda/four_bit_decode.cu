// Packed four-bit weights to the bf16 matrix [n, k] they stand for: code times scale in fp32, rounded once.
// Compiled after nf4_matvec.cu, whose Format knows the packed order. One warp a stage: 16 rows of 256 columns.

struct Decode {
  const float* codebook;   // [16]
  u16* out;                // [rows of the tiles asked for, k]
  int first_tile, tiles, k;
};

extern "C" __global__ void __launch_bounds__(256) four_bit_decode(Decode p, Format format) {
  __shared__ float values[16][32];   // one column a lane: no two lanes meet in a bank
  for (int i = threadIdx.x; i < 512; i += 256) values[i / 32][i % 32] = p.codebook[i / 32];
#if NESTED
  __shared__ float map[256];
  map[threadIdx.x] = format.byte_map[threadIdx.x];
#endif
  previous_kernels_done();
  next_kernel_may_start();
  __syncthreads();
  Lane lane;
  lane.id = threadIdx.x % 32, lane.group = lane.id / 4, lane.quad = lane.id % 4;
  const long long stages = (long long)p.tiles * format.steps;
  for (long long i = blockIdx.x * 8LL + threadIdx.x / 32; i < stages; i += gridDim.x * 8LL) {
    const int tile = p.first_tile + (int)(i / format.steps), step = (int)(i % format.steps);
    const Format::Fragment f = format.read(lane, tile, step);
    const Format::Scale group = format.scale(lane, tile, step);
#if NESTED
    const u32 bytes = __float_as_uint(f.scales.x);
    const float2 scales = make_float2(map[bytes & 255] * group.low + group.offset, map[bytes >> 8] * group.high + group.offset);
#else
    const float2 scales = f.scales;
#endif
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int column = step * Format::STEP + b * 64 + lane.quad * 16;
      const u32 words[4] = {f.codes[b].x, f.codes[b].y, f.codes[b].z, f.codes[b].w};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = __shfl_sync(0xffffffffu, r ? scales.y : scales.x, (lane.id & 28) + b);
        const int row = tile * TILE + lane.group + r * 8;
        u32 pairs[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const u32 byte = words[r * 2 + j / 4] >> (j % 4 * 8);
          pairs[j] = pack_bf16(values[byte >> 4 & 15][lane.id] * scale, values[byte & 15][lane.id] * scale);
        }
        if (row < format.n && column < p.k) {
          uint4* const to = reinterpret_cast<uint4*>(p.out + (size_t)(row - p.first_tile * TILE) * p.k + column);
          to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
          to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
        }
      }
    }
  }
}
