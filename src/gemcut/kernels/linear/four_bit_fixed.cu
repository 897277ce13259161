// Four-bit weights in warps of fixed columns (fixed.cuh). Compiled after four_bit_gemv.cu and fixed.cuh.
//
// A matrix instruction has eight columns for x and one row needs one: column 2 * b + s holds block b of x in step s,
// and 8 registers hold two whole steps. A product with block b is then right in column 2 * b + s alone, which is where
// the lanes of quad b look; they have block b's scales too. Eight rows of one step take 32 registers and all columns, 16 rows
// 64 registers and two instructions.

#if FIXED_ROWS == 1
template <int WARPS, int TILES_AHEAD, int STEPS>
__device__ __forceinline__ void run_fixed_row(const Problem& p, const Format& format) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const tables = shared;
  float* const segments = reinterpret_cast<float*>(tables + Format::TABLE_BYTES);   // [tiles, warps, 16]
  const Fixed f = fixed_columns<STEPS>(p);
  const Lane& lane = f.lane;

  next_kernel_may_start();
  Format::Fragment held[TILES_AHEAD][STEPS];
  Format::Scale group_scales[TILES_AHEAD][STEPS];
  auto read = [&](Format::Fragment& fragment, Format::Scale& scale, int tile, int s) {
    if (tile < f.tile_end && s < f.own) {
      fragment = format.read(lane, tile, f.first + s);
      scale = format.scale(lane, tile, f.first + s);
    }
  };
#pragma unroll
  for (int t = 0; t < TILES_AHEAD; ++t) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) read(held[t][s], group_scales[t][s], f.tile_begin + t, s);
  }
  format.fill_tables(tables, WARPS * 32);
  __syncthreads();

  previous_kernels_done();
  uint4 xa = make_uint4(0, 0, 0, 0), xb = xa;
  const int x_step = lane.group & 1, column = (f.first + x_step) * Format::STEP + (lane.group >> 1) * 64 + lane.quad * 16;
  if (x_step < f.own && column < p.k) {
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
      for (int s = 0; s < STEPS; ++s) {
        if (s < f.own) {
          const float2 scales = format.expand(held[t][s], group_scales[t][s], tables);
          float mine_low = 0.f, mine_high = 0.f;
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            float d[4];
            Format::multiply_block(held[t][s].codes[b], xa, xb, tables, lane.id * 4, d);
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
      float* const to = segments + ((tile - f.tile_begin) * WARPS + f.warp) * TILE + lane.group;
      if (lane.quad == 0) to[0] = low, to[8] = high;
    }
  }
  add_warps<WARPS, 1>(p, format, f, segments);
}

static_assert(FIXED_STEPS <= 2, "x has columns for two steps");
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
four_bit_fixed(Problem problem, Format format) { run_fixed_row<BLOCK_WARPS, BLOCK_STAGES / FIXED_STEPS, FIXED_STEPS>(problem, format); }
#else
static_assert(FIXED_STEPS == 1, "eight or 16 rows of one step fill the registers");
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
four_bit_fixed(Problem problem, Format format) { run_fixed_rows<Format, BLOCK_WARPS, FIXED_STEPS, FIXED_ROWS / 8>(problem, format); }
#endif
