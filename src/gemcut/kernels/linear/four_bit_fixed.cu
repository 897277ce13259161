// Computes: y = x W^T of small NF4 or FP4 matrices, each warp with fixed columns (fixed.cuh)
// Shapes: x bf16 [m, k], m = 1, up to 8 or up to 16 (FIXED_ROWS); W as in four_bit_gemv.cu; y bf16 [m, n]
// Runs: linear/gemv.py where plan_fixed() takes it; measured on an H100 (docs/notes/linear-four-bit-gemv.md)
// Schedule: GEMV, x register-stationary, TILES_AHEAD row tiles in flight; split-K fix-up of gemv.cuh
// Invariants: at most two k_blocks a warp for one row, one for 8 or 16 rows: more do not fit the registers
//
// A matrix instruction has eight columns for x and one row needs one. Column 2 * b + s holds block b of x in k_block s, so 8
// registers hold two whole k_blocks. The result for block b is then right in column 2 * b + s alone, which is where the lanes
// of quad b look; they have block b's scales too. Eight rows of one k_block take 32 registers and all columns, 16 rows 64
// registers and two instructions. Compiled after four_bit_gemv.cu and fixed.cuh.

#if FIXED_ROWS == 1
template <int WARPS, int TILES_AHEAD, int K_BLOCKS>
__device__ __forceinline__ void gemv_fixed_row(const Problem& p, const Format& format) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const codebook = shared;
  float* const partials = reinterpret_cast<float*>(codebook + Format::CODEBOOK_BYTES);   // [tiles, warps, 16]
  const Fixed f = fixed_columns<K_BLOCKS>(p);
  const Lane& lane = f.lane;

  next_kernel_may_start();
  Format::Fragment held[TILES_AHEAD][K_BLOCKS];
  Format::Scale group_scales[TILES_AHEAD][K_BLOCKS];
  auto read = [&](Format::Fragment& fragment, Format::Scale& scale, int tile, int s) {
    if (tile < f.tile_end && s < f.own) {
      fragment = format.read(lane, tile, f.first + s);
      scale = format.scale(lane, tile, f.first + s);
    }
  };
#pragma unroll
  for (int t = 0; t < TILES_AHEAD; ++t) {
#pragma unroll
    for (int s = 0; s < K_BLOCKS; ++s) read(held[t][s], group_scales[t][s], f.tile_begin + t, s);
  }
  format.fill_codebook(codebook, WARPS * 32);
  __syncthreads();

  previous_kernels_done();
  uint4 xa = make_uint4(0, 0, 0, 0), xb = xa;
  const int x_k_block = lane.group & 1, column = (f.first + x_k_block) * Format::K_BLOCK + (lane.group >> 1) * 64 + lane.quad * 16;
  if (x_k_block < f.own && column < p.k) {
    const uint4* const from = reinterpret_cast<const uint4*>(p.x + column * 2);
    xa = __ldcg(from), xb = __ldcg(from + 1);
  }

  for (int tile_from = f.tile_begin; tile_from < f.tile_end; tile_from += TILES_AHEAD) {
#pragma unroll
    for (int t = 0; t < TILES_AHEAD; ++t) {
      const int tile = tile_from + t;
      if (tile >= f.tile_end) break;
      float low = 0.f, high = 0.f;
#pragma unroll
      for (int s = 0; s < K_BLOCKS; ++s) {
        if (s < f.own) {
          const float2 scales = format.expand(held[t][s], group_scales[t][s], codebook);
          float mine_low = 0.f, mine_high = 0.f;
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            float d[4];
            Format::multiply_block(held[t][s].codes[b], xa, xb, codebook, lane.id * 4, d);
            if (lane.quad == b) mine_low = d[s], mine_high = d[2 + s];
          }
          low += mine_low * scales.x, high += mine_high * scales.y;
          read(held[t][s], group_scales[t][s], tile + TILES_AHEAD, s);
        }
      }
#pragma unroll
      for (int quads = 1; quads < 4; quads *= 2) {
        low += __shfl_xor_sync(0xffffffffu, low, quads);
        high += __shfl_xor_sync(0xffffffffu, high, quads);
      }
      float* const to = partials + ((tile - f.tile_begin) * WARPS + f.warp) * TILE + lane.group;
      if (lane.quad == 0) to[0] = low, to[8] = high;
    }
  }
  sum_warps<WARPS, 1>(p, format, f, partials);
}

static_assert(FIXED_K_BLOCKS <= 2, "x has columns for two k_blocks");
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
four_bit_fixed(Problem problem, Format format) { gemv_fixed_row<BLOCK_WARPS, BLOCK_STAGES / FIXED_K_BLOCKS, FIXED_K_BLOCKS>(problem, format); }
#else
static_assert(FIXED_K_BLOCKS == 1, "eight or 16 rows of one k_block fill the registers");
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
four_bit_fixed(Problem problem, Format format) { gemv_fixed_rows<Format, BLOCK_WARPS, FIXED_K_BLOCKS, FIXED_ROWS / 8>(problem, format); }
#endif
