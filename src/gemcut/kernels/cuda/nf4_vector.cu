// One row of x against four-bit weights: each warp keeps a few fixed column steps, so that its part of x stays in registers.
//
// A matrix instruction has eight columns for x and one row needs one: column 2 * b + s (s: the parity of the step) holds block b
// of x, so 8 registers hold two whole steps. The product with block b is then right in column 2 * b + s alone,
// which is where the lane of quarter b looks; that lane also has block b's scale. No shuffles, no staging of x.

// A tile's stages of one warp in its sum: `d` holds 16 x 8 sums for each block.
template <int PARITY>
__device__ __forceinline__ void multiply_fixed(const Format& format, const Format::Fragment& f, const Format::Scale& group,
                                               const u8* tables, const uint4& xa, const uint4& xb, const Lane& lane,
                                               float& low, float& high) {
#if NESTED
  const u32 bytes = __float_as_uint(f.scales.x);
  const float* const map = reinterpret_cast<const float*>(tables + Format::PAIR_BYTES);
  const float scale_low = map[bytes & 255] * group.low + format.offset, scale_high = map[bytes >> 8] * group.high + format.offset;
#else
  const float scale_low = f.scales.x, scale_high = f.scales.y;
#endif
  const u32 lane4 = lane.id * 4;
  float mine_low = 0.f, mine_high = 0.f;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const uint4 q = f.codes[b];
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    multiply_add(d, Format::pair<0>(tables, lane4, q.x), Format::pair<0>(tables, lane4, q.z), Format::pair<1>(tables, lane4, q.x),
                 Format::pair<1>(tables, lane4, q.z), xa.x, xa.y);
    multiply_add(d, Format::pair<2>(tables, lane4, q.x), Format::pair<2>(tables, lane4, q.z), Format::pair<3>(tables, lane4, q.x),
                 Format::pair<3>(tables, lane4, q.z), xa.z, xa.w);
    multiply_add(d, Format::pair<0>(tables, lane4, q.y), Format::pair<0>(tables, lane4, q.w), Format::pair<1>(tables, lane4, q.y),
                 Format::pair<1>(tables, lane4, q.w), xb.x, xb.y);
    multiply_add(d, Format::pair<2>(tables, lane4, q.y), Format::pair<2>(tables, lane4, q.w), Format::pair<3>(tables, lane4, q.y),
                 Format::pair<3>(tables, lane4, q.w), xb.z, xb.w);
    if (lane.quad == b) mine_low = d[PARITY], mine_high = d[2 + PARITY];
  }
  low += mine_low * scale_low;
  high += mine_high * scale_high;
}

template <int WARPS, int STAGES, int OWN, bool RING>
__device__ __forceinline__ void run_fixed(const Problem& p, const Format& format) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const tables = shared;
  u8* const ring_all = tables + Format::TABLE_BYTES;
  float* const segments = reinterpret_cast<float*>(ring_all + (RING ? WARPS * STAGES * Format::STAGE_BYTES : 0));   // [tiles, warps, 16]

  const int warp = threadIdx.x / 32;
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  const Rows rows = block_rows<Format>(p);
  const int step_end = min((int)(blockIdx.y + 1) * p.slice_steps, p.steps);
  const int first = blockIdx.y * p.slice_steps + warp * OWN;
  const int own = max(min(step_end - first, OWN), 0);

  next_kernel_may_start();
  u8* const ring = ring_all + warp * STAGES * Format::STAGE_BYTES;
  int load_row = rows.begin, load_own = 0, slot = 0;
  auto load_one = [&](u8* stage) {
    if (load_row < rows.end && own > 0) {
      format.load(stage, lane, load_row, rows.end, first + load_own);
      if (++load_own == own) load_own = 0, load_row += TILE;
    }
    copies_close();
  };
  Format::Fragment held[RING ? 1 : STAGES];
  Format::Scale held_scale[RING ? 1 : STAGES];
  auto hold_one = [&](Format::Fragment& f, Format::Scale& s, int row0, int j) {
    if (row0 < rows.end && j < own) {
      f = format.read(lane, row0, first + j);
      s = format.scale(lane, row0, first + j);
    }
  };
  if (RING) {
#pragma unroll
    for (int i = 0; i < STAGES; ++i) load_one(ring + i * Format::STAGE_BYTES);
  } else {
#pragma unroll
    for (int i = 0; i < STAGES; ++i) hold_one(held[i], held_scale[i], rows.begin + i / OWN * TILE, i % OWN);
  }
  format.fill_tables(tables, WARPS * 32);
  Format::Scale scale = {};
  if (RING && own > 0) scale = format.scale(lane, rows.begin, first);
  __syncthreads();

  previous_kernels_done();
  uint4 xa[(OWN + 1) / 2], xb[(OWN + 1) / 2];
#pragma unroll
  for (int i = 0; i < (OWN + 1) / 2; ++i) {
    const int s = i * 2 + (lane.group & 1);
    const int column = (first + s) * Format::STEP + (lane.group >> 1) * 64 + lane.quad * 16;
    xa[i] = xb[i] = make_uint4(0, 0, 0, 0);
    if (s < own && column < p.k) {
      const uint4* const from = reinterpret_cast<const uint4*>(p.x + (size_t)column * 2);
      xa[i] = __ldcg(from), xb[i] = __ldcg(from + 1);
    }
  }

  auto finish_tile = [&](int row0, float low, float high) {
    low += __shfl_xor_sync(0xffffffffu, low, 1);
    high += __shfl_xor_sync(0xffffffffu, high, 1);
    low += __shfl_xor_sync(0xffffffffu, low, 2);
    high += __shfl_xor_sync(0xffffffffu, high, 2);
    float* const to = segments + ((row0 - rows.begin) * WARPS + warp * TILE) + lane.group;
    if (lane.quad == 0) to[0] = low, to[8] = high;
  };
  if (RING) {
    for (int row0 = rows.begin; row0 < rows.end; row0 += TILE) {
      float low = 0.f, high = 0.f;
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        if (j < own) {
          u8* const stage = ring + slot * Format::STAGE_BYTES;
          slot = slot + 1 == STAGES ? 0 : slot + 1;
          copies_wait<STAGES - 1>();
          __syncwarp();
          const Format::Fragment fragment = format.fetch(stage, lane);
          __syncwarp();
          load_one(stage);
          const bool over = j + 1 == own;
          const Format::Scale next = format.scale(lane, row0 + over * TILE, first + (over ? 0 : j + 1));
          if (j % 2) multiply_fixed<1>(format, fragment, scale, tables, xa[j / 2], xb[j / 2], lane, low, high);
          else multiply_fixed<0>(format, fragment, scale, tables, xa[j / 2], xb[j / 2], lane, low, high);
          scale = next;
        }
      }
      finish_tile(row0, low, high);
    }
  } else {
    constexpr int AT_ONCE = STAGES / OWN;   // tiles in flight
    for (int from = rows.begin; from < rows.end; from += AT_ONCE * TILE) {
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t) {
        const int row0 = from + t * TILE;
        if (row0 < rows.end) {
          float low = 0.f, high = 0.f;
#pragma unroll
          for (int j = 0; j < OWN; ++j) {
            if (j < own) {
              Format::Fragment& f = held[t * OWN + j];
              Format::Scale& s = held_scale[t * OWN + j];
              if (j % 2) multiply_fixed<1>(format, f, s, tables, xa[j / 2], xb[j / 2], lane, low, high);
              else multiply_fixed<0>(format, f, s, tables, xa[j / 2], xb[j / 2], lane, low, high);
              hold_one(f, s, row0 + AT_ONCE * TILE, j);
            }
          }
          finish_tile(row0, low, high);
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows.tiles * TILE; i += WARPS * 32) {
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) value += segments[(i / TILE * WARPS + w) * TILE + i % TILE];
    emit(p, format, rows.begin + i, rows.end, 0, value);
  }
  if (gridDim.y > 1) add_slices(p, format, rows, WARPS * 32);
}

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
nf4_vector(Problem problem, Format format) { run_fixed<BLOCK_WARPS, BLOCK_STAGES, BLOCK_OWN, BLOCK_RING>(problem, format); }
