// One to eight rows of x against four-bit weights where each warp keeps FIXED_STEPS column steps for all tiles of its block.
//
// So its part of x stays in registers: nothing of x is staged, and no barrier stands between x and the first product.
// A matrix instruction has eight columns for x and one row needs one: column 2 * b + s holds block b of x in step s,
// and 8 registers hold two whole steps. A product with block b is then right in column 2 * b + s alone, which is where
// the lanes of quad b look; they have block b's scales too. Eight rows of one step take 32 registers and all columns.
// Compiled after matvec.cuh and nf4_matvec.cu.

#if FIXED_ROWS == 1
template <int WARPS, int TILES_AHEAD, int STEPS>
__device__ __forceinline__ void run_fixed(const Problem& p, const Format& format) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const tables = shared;
  float* const segments = reinterpret_cast<float*>(tables + Format::TABLE_BYTES);   // [tiles, warps, 16]

  const int warp = threadIdx.x / 32;
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  const int tile_begin = blockIdx.x * (u32)p.tiles / gridDim.x, tile_end = (blockIdx.x + 1) * (u32)p.tiles / gridDim.x;
  const int first = blockIdx.y * p.slice_steps + warp * STEPS;
  const int own = max(min(min((int)(blockIdx.y + 1) * p.slice_steps, p.steps) - first, STEPS), 0);

  next_kernel_may_start();
  Format::Fragment held[TILES_AHEAD][STEPS];
  Format::Scale group_scales[TILES_AHEAD][STEPS];
  auto read = [&](Format::Fragment& fragment, Format::Scale& scale, int tile, int s) {
    if (tile < tile_end && s < own) {
      fragment = format.read(lane, tile, first + s);
      scale = format.scale(lane, tile, first + s);
    }
  };
#pragma unroll
  for (int t = 0; t < TILES_AHEAD; ++t) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) read(held[t][s], group_scales[t][s], tile_begin + t, s);
  }
  format.fill_tables(tables, WARPS * 32);
  __syncthreads();

  previous_kernels_done();
  uint4 xa = make_uint4(0, 0, 0, 0), xb = xa;
  const int x_step = lane.group & 1, column = (first + x_step) * Format::STEP + (lane.group >> 1) * 64 + lane.quad * 16;
  if (x_step < own && column < p.k) {
    const uint4* const from = reinterpret_cast<const uint4*>(p.x + column * 2);
    xa = __ldcg(from), xb = __ldcg(from + 1);
  }

  for (int tile_from = tile_begin; tile_from < tile_end; tile_from += TILES_AHEAD) {
#pragma unroll
    for (int t = 0; t < TILES_AHEAD; ++t) {
      const int tile = tile_from + t;
      if (tile >= tile_end) break;
      float low = 0.f, high = 0.f;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        if (s < own) {
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
      float* const to = segments + ((tile - tile_begin) * WARPS + warp) * TILE + lane.group;
      if (lane.quad == 0) to[0] = low, to[8] = high;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (tile_end - tile_begin) * TILE; i += WARPS * 32) {
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) value += segments[(i / TILE * WARPS + w) * TILE + i % TILE];
    emit(p, format, tile_begin + i / TILE, i % TILE, 0, value);
  }
  if (gridDim.y > 1) add_slices(p, format, tile_begin, tile_end, WARPS * 32);
}

static_assert(FIXED_STEPS <= 2, "x has columns for two steps");
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
nf4_fixed(Problem problem, Format format) { run_fixed<BLOCK_WARPS, BLOCK_STAGES / FIXED_STEPS, FIXED_STEPS>(problem, format); }
#else
static_assert(FIXED_STEPS == 1 && BLOCK_STAGES == 1, "eight rows of one step fill the registers");
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT) nf4_fixed(Problem p, Format format) {
  constexpr int WARPS = BLOCK_WARPS;
  extern __shared__ __align__(128) u8 shared[];
  u8* const tables = shared;
  float* const segments = reinterpret_cast<float*>(tables + Format::TABLE_BYTES);   // [tiles, warps, 16, 8]

  const int warp = threadIdx.x / 32;
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  const int tile_begin = blockIdx.x * (u32)p.tiles / gridDim.x, tile_end = (blockIdx.x + 1) * (u32)p.tiles / gridDim.x;
  const int step = blockIdx.y * p.slice_steps + warp;
  const bool own = warp < p.slice_steps && step < p.steps;

  next_kernel_may_start();
  Format::Fragment held;
  Format::Scale group_scale;
  if (own) held = format.read(lane, tile_begin, step), group_scale = format.scale(lane, tile_begin, step);
  format.fill_tables(tables, WARPS * 32);
  __syncthreads();

  previous_kernels_done();
  uint4 xa[4], xb[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    xa[b] = xb[b] = make_uint4(0, 0, 0, 0);
    const int column = step * Format::STEP + b * 64 + lane.quad * 16;
    if (own && lane.group < p.m && column < p.k) {
      const uint4* const from = reinterpret_cast<const uint4*>(p.x + (size_t)lane.group * p.x_stride + column * 2);
      xa[b] = __ldcg(from), xb[b] = __ldcg(from + 1);
    }
  }

  for (int tile = tile_begin; tile < tile_end; ++tile) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    if (own) {
      const float2 scales = format.expand(held, group_scale, tables);
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float d[4];
        Format::multiply_block(held.codes[b], xa[b], xb[b], tables, lane.id * 4, d);
        const float low = __shfl_sync(0xffffffffu, scales.x, (lane.id & 28) + b);
        const float high = __shfl_sync(0xffffffffu, scales.y, (lane.id & 28) + b);
        sum[0] += d[0] * low, sum[1] += d[1] * low, sum[2] += d[2] * high, sum[3] += d[3] * high;
      }
      if (tile + 1 < tile_end) held = format.read(lane, tile + 1, step), group_scale = format.scale(lane, tile + 1, step);
    }
    float2* const to = reinterpret_cast<float2*>(segments) + (((tile - tile_begin) * WARPS + warp) * TILE + lane.group) * 4 + lane.quad;
    to[0] = make_float2(sum[0], sum[1]), to[32] = make_float2(sum[2], sum[3]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (tile_end - tile_begin) * TILE * 8; i += WARPS * 32) {
    if (i % 8 >= p.m) continue;
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) value += segments[(i / (TILE * 8) * WARPS + w) * (TILE * 8) + i % (TILE * 8)];
    emit(p, format, tile_begin + i / (TILE * 8), i / 8 % TILE, i % 8, value);
  }
  if (gridDim.y > 1) add_slices(p, format, tile_begin, tile_end, WARPS * 32);
}
#endif
