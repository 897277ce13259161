// Computes: packed NF4 or FP4 weights to the bf16 matrix they stand for: code times scale in fp32, rounded once
// Shapes: codes and scales as in four_bit_gemv.cu -> bf16 [16 * tiles, k], from tile `first_tile` on
// Runs: linear/cuda.py, before cuBLAS or gated_gemm multiplies many rows
// Schedule: grid-stride loop, one warp a stage (16 rows by 256 columns), the next stage read ahead
// Invariants: the same values as plain dequantization; rows past n and columns past k are not written
//
// Compiled after four_bit_gemv.cu, whose Format knows the packed layout.

struct Dequant {
  const float* codebook;   // [16]
  u16* out;                // [rows of these tiles, k]
  int first_tile, tiles, k;
};

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) four_bit_dequant(Dequant p, Format format) {
  __shared__ float values[16][32];   // one column a lane: no two lanes meet in a bank
  for (int i = threadIdx.x; i < 512; i += THREADS) values[i / 32][i % 32] = p.codebook[i / 32];
#if NESTED
  __shared__ float map[256];
  for (int i = threadIdx.x; i < 256; i += THREADS) map[i] = format.byte_map[i];
#endif
  previous_kernels_done();
  next_kernel_may_start();
  __syncthreads();
  Lane lane;
  lane.id = threadIdx.x % 32, lane.group = lane.id / 4, lane.quad = lane.id % 4;
  const long long stages = (long long)p.tiles * format.k_blocks;
  constexpr long long WARPS = THREADS / 32;
  Format::Fragment next;
  Format::Scale next_group;
  auto read = [&](long long i) {   // a stage ahead of its use
    const int tile = p.first_tile + (int)(i / format.k_blocks), k_block = (int)(i % format.k_blocks);
    next = format.read(lane, tile, k_block), next_group = format.scale(lane, tile, k_block);
  };
  long long i = blockIdx.x * WARPS + threadIdx.x / 32;
  if (i < stages) read(i);
  for (; i < stages; i += gridDim.x * WARPS) {
    const int tile = p.first_tile + (int)(i / format.k_blocks), k_block = (int)(i % format.k_blocks);
    const Format::Fragment f = next;
    const Format::Scale group = next_group;
    if (i + gridDim.x * WARPS < stages) read(i + gridDim.x * WARPS);
#if NESTED
    const u32 bytes = __float_as_uint(f.scales.x);
    const float2 scales = make_float2(map[bytes & 255] * group.low + group.offset, map[bytes >> 8] * group.high + group.offset);
#else
    const float2 scales = f.scales;
#endif
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int column = k_block * Format::K_BLOCK + b * 64 + lane.quad * 8;
      const u32 words[4] = {f.codes[b].x, f.codes[b].y, f.codes[b].z, f.codes[b].w};
      const int near = (lane.id & 28) + lane.quad / 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = __shfl_sync(0xffffffffu, r ? scales.y : scales.x, (lane.id & 28) + b);
        const int row = tile * TILE + lane.group + r * 8;
        // A lane holds 16 neighbouring columns. Four lanes exchange codes, so that together they store 64 contiguous bytes.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 even = __shfl_sync(0xffffffffu, words[r * 2], near + half * 2);
          const u32 odd = __shfl_sync(0xffffffffu, words[r * 2 + 1], near + half * 2);
          const u32 word = lane.quad % 2 ? odd : even;
          u32 pairs[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const u32 byte = word >> (j * 8);
            pairs[j] = pack_bf16(values[byte >> 4 & 15][lane.id] * scale, values[byte & 15][lane.id] * scale);
          }
          if (row < format.n && column + half * 32 < p.k) {
            u16* const to = p.out + (size_t)(row - p.first_tile * TILE) * p.k + column + half * 32;
            *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
          }
        }
      }
    }
  }
}
