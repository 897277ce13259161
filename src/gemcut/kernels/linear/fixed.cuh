// Computes: the GEMV of small matrices: each warp keeps its k_blocks for all tiles of its block, with x in registers
// Shapes: x bf16 [m, k], m up to 8 or 16; W [n, k] in a format's layout; y bf16 or fp32 [m, n]
// Runs: four_bit_fixed (up to 8 or 16 rows) and int8_fixed (up to 8); planned by plan_fixed() of linear/gemv.py
// Schedule: GEMV with fixed columns a warp (x register-stationary); partial sums meet in shared memory; split-K fix-up
// Invariants: x is never staged in shared memory; no barrier between x and the first product; fixed order of sums
//
// Needs of the format's struct: read() fetches a stage to registers, multiply_held() multiplies it. Compiled after gemv.cuh and
// the format's file. One row of four-bit weights has its own variant in four_bit_fixed.cu.

struct Fixed {   // what a warp of a block works on
  Lane lane;
  int warp, tile_begin, tile_end, first, own;   // `own` k_blocks from `first` on
};
template <int K_BLOCKS>
__device__ __forceinline__ Fixed fixed_columns(const Problem& p) {
  Fixed f;
  f.warp = threadIdx.x / 32;
  f.lane.id = threadIdx.x % 32;
  f.lane.group = f.lane.id / 4;
  f.lane.quad = f.lane.id % 4;
  f.tile_begin = blockIdx.x * (u32)p.tiles / gridDim.x, f.tile_end = (blockIdx.x + 1) * (u32)p.tiles / gridDim.x;
  f.first = blockIdx.y * p.slice_k_blocks + f.warp * K_BLOCKS;
  f.own = max(min(min((int)(blockIdx.y + 1) * p.slice_k_blocks, p.k_blocks) - f.first, K_BLOCKS), 0);
  return f;
}

// Adds up the warps' partial sums, `partials` [tiles, warps, 16, COLUMNS], in the order of the warps.
template <int WARPS, int COLUMNS, class Format>
__device__ __forceinline__ void sum_warps(const Problem& p, const Format& format, const Fixed& f, const float* partials) {
  constexpr int VALUES = TILE * COLUMNS;
  __syncthreads();
  for (int i = threadIdx.x; i < (f.tile_end - f.tile_begin) * VALUES; i += WARPS * 32) {
    if (i % COLUMNS >= p.m) continue;
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) value += partials[(i / VALUES * WARPS + w) * VALUES + i % VALUES];
    emit(p, format, f.tile_begin + i / VALUES, i / COLUMNS % TILE, i % COLUMNS, value);
  }
  if (gridDim.y > 1) fix_up_slices(p, format, f.tile_begin, f.tile_end, WARPS * 32);
}

template <class Format, int WARPS, int K_BLOCKS, int GROUPS>   // of eight rows of x
__device__ __forceinline__ void gemv_fixed_rows(const Problem& p, const Format& format) {
  constexpr int BLOCKS = Format::K_BLOCK / 64;   // of a k_block
  extern __shared__ __align__(128) u8 shared[];
  u8* const codebook = shared;
  float* const partials = reinterpret_cast<float*>(codebook + Format::CODEBOOK_BYTES);
  const Fixed f = fixed_columns<K_BLOCKS>(p);
  const Lane& lane = f.lane;

  next_kernel_may_start();
  typename Format::Fragment held[K_BLOCKS];
  typename Format::Scale group_scales[K_BLOCKS];
  auto read = [&](int s, int tile) {
    if (tile < f.tile_end && s < f.own) {
      held[s] = format.read(lane, tile, f.first + s);
      group_scales[s] = format.scale(lane, tile, f.first + s);
    }
  };
#pragma unroll
  for (int s = 0; s < K_BLOCKS; ++s) read(s, f.tile_begin);
  format.fill_codebook(codebook, WARPS * 32);
  __syncthreads();

  previous_kernels_done();
  uint4 xa[K_BLOCKS][BLOCKS][GROUPS], xb[K_BLOCKS][BLOCKS][GROUPS];
#pragma unroll
  for (int i = 0; i < K_BLOCKS * BLOCKS; ++i) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      uint4 &a = xa[i / BLOCKS][i % BLOCKS][g], &b = xb[i / BLOCKS][i % BLOCKS][g];
      a = b = make_uint4(0, 0, 0, 0);
      const int row = g * 8 + lane.group, column = f.first * Format::K_BLOCK + i * 64 + lane.quad * 16;
      if (i / BLOCKS < f.own && row < p.m && column < p.k) {
        const uint4* const from = reinterpret_cast<const uint4*>(p.x + (size_t)row * p.x_stride + column * 2);
        a = __ldcg(from), b = __ldcg(from + 1);
      }
    }
  }

  for (int tile = f.tile_begin; tile < f.tile_end; ++tile) {
    float sum[GROUPS][4] = {};
#pragma unroll
    for (int s = 0; s < K_BLOCKS; ++s) {
      if (s < f.own) format.multiply_held(held[s], group_scales[s], xa[s], xb[s], codebook, lane, sum);
      read(s, tile + 1);
    }
    float2* const to = reinterpret_cast<float2*>(partials) + (((tile - f.tile_begin) * WARPS + f.warp) * TILE + lane.group) * 4 * GROUPS;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      to[g * 4 + lane.quad] = make_float2(sum[g][0], sum[g][1]);
      to[(8 * GROUPS + g) * 4 + lane.quad] = make_float2(sum[g][2], sum[g][3]);
    }
  }
  sum_warps<WARPS, 8 * GROUPS>(p, format, f, partials);
}
