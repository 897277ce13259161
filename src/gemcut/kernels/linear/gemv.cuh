// Computes: y[m, n] = sum over k of x[m, k] * W[n, k] for a few rows of x: the GEMV that all weight formats share
// Shapes: x bf16 [m, k], m from 1 to 8; W [n, k] in a format's layout; y bf16 or fp32 [m, n]; sums fp32
// Runs: bf16_gemv, int8_gemv, four_bit_gemv; launched by linear/gemv.py; grid [chunks of row tiles, slices of k]
// Schedule: persistent GEMV, a cp.async ring a warp; split-K with a Stream-K fix-up (arXiv 2301.03598)
// Invariants: W is read once; sums are added in a fixed order, whatever the timing; p.arrivals is zero between launches
//
// The time of a GEMV is the time to read W once. So W goes through a ring of asynchronous copies per warp, deep enough to keep
// device memory busy, and everything else is kept short. The arithmetic is matrix instructions (m16n8k16: 16 rows of W by 8
// rows of x). With one row of x seven of the eight columns repeat it, which costs nothing here.
//
// A stage is 16 rows of W (a row tile) by Format::K_BLOCK columns. blockIdx.y owns one slice of the columns of W (split-K),
// blockIdx.x a chunk of row tiles. The stages of a block are split evenly and contiguously between its warps. A tile that
// several warps share is summed in shared memory, in the order of the warps. A tile that several slices share is summed by the
// block that finishes last (the fix-up), in the order of the slices.
//
// launch.cuh stands before this file. The format's file is compiled after it: it defines `struct Format`, and its kernel calls
// gemv().

constexpr int TILE = 16;      // rows of W a matrix instruction takes

struct Problem {
  const u8* x;           // bf16 [m, k], rows x_stride bytes apart
  u8* y;                 // bf16 or fp32 [m, n]
  float* partial;        // [slices, tiles, 16, m] where there are several slices
  u32* arrivals;         // [gridDim.x], zero between launches
  float softcap;         // 0: none; of fp32 outputs only
  int m, n, k, x_stride, tiles, k_blocks, slice_k_blocks;
};

struct Lane {
  int id, group, quad;   // group = row of the tile (and group + 8), quad = which quarter of the columns
};

// Copies 16 bytes to shared memory without passing through registers; writes zeros where `valid` is false.
// L2 fetches the 256 bytes around: their other parts are wanted next, and long reads of memory are faster.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0));
}

// The same to registers, past L1.
__device__ __forceinline__ uint4 read16(const void* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Lanes 4 * row + quad of a warp: the fragments of 16 rows of 128 bytes of a row-major weight (bf16 and int8 share them).
struct RowFragment {
  uint4 low[2], high[2];   // [half of the columns], rows group and group + 8
};
constexpr int ROW_STAGE = TILE * 128;

// Each instruction copies four whole rows of 128 bytes; odd rows swap their halves so that fetch_rows meets no bank twice.
__device__ __forceinline__ void load_rows(u8* stage, int lane, const u8* weight, int row0, int n, long long row_bytes, long long at) {
  const int chunk = lane % 8;
  const bool valid = at + chunk * 16 < row_bytes;
  const u8* const from = weight + (valid ? at + chunk * 16 : 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i * 4 + lane / 8;
    copy16(stage + r * 128 + (chunk ^ (r & 1) * 4) * 16, from + min(row0 + r, n - 1) * row_bytes, valid);
  }
}
__device__ __forceinline__ RowFragment fetch_rows(const u8* stage, const Lane& lane) {
  RowFragment f;
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const u8* const from = stage + lane.group * 128 + ((b * 4 + lane.quad) ^ (lane.group & 1) * 4) * 16;
    f.low[b] = *reinterpret_cast<const uint4*>(from);
    f.high[b] = *reinterpret_cast<const uint4*>(from + 8 * 128);
  }
  return f;
}

// What the formats share whose W is stored row-major, without scales of blocks: bf16 and int8. A Format derives from it, has
// `weight`, `n`, K_BLOCK and X_LANE, and says how many bytes a row takes.
template <class Format>
struct RowMajor {
  static constexpr int STAGE_BYTES = ROW_STAGE;
  static constexpr int CODEBOOK_BYTES = 0;
  using Fragment = RowFragment;
  struct Scale {};
  struct ScaleCursor {};
  struct Cursor { int tile, k_block; };

  __device__ __forceinline__ Cursor cursor(const Lane&, int tile, int k_block) const { return {tile, k_block}; }
  __device__ __forceinline__ static void advance(Cursor& cursor) { ++cursor.k_block; }
  __device__ __forceinline__ void load(u8* stage, const Lane& lane, int tile, int k_block) const {
    const Format& w = static_cast<const Format&>(*this);
    load_rows(stage, lane.id, w.weight, tile * TILE, w.n, w.row_bytes(), k_block * 128LL);
  }
  __device__ __forceinline__ void load(u8* stage, const Lane& lane, const Cursor& cursor) const { load(stage, lane, cursor.tile, cursor.k_block); }
  __device__ __forceinline__ Fragment fetch(const u8* stage, const Lane& lane) const { return fetch_rows(stage, lane); }

  __device__ __forceinline__ ScaleCursor scale_cursor(const Lane&, int, int) const { return {}; }
  __device__ __forceinline__ static void advance(ScaleCursor&) {}
  __device__ __forceinline__ Scale scale(const ScaleCursor&) const { return {}; }
  __device__ __forceinline__ Scale scale(const Lane&, int, int) const { return {}; }
  __device__ __forceinline__ void fetch_scales(const Lane&, int) const {}
  __device__ __forceinline__ void fill_codebook(u8*, int) const {}

  // One row of x, as in four_bit_gemv.cu: the quads without x add zero.
  __device__ __forceinline__ void multiply_row(const Fragment& f, const Scale& s, const u8* codebook, const u8* x, const Lane& lane,
                                               float (&sum)[4]) const {
    static_cast<const Format&>(*this).multiply(f, s, codebook, x + lane.quad * Format::X_LANE, lane.group == 0, lane, sum);
  }
};

__device__ __forceinline__ void fetch_x(uint4& x, const u8* from, bool has_x) {
  if (has_x) x = *reinterpret_cast<const uint4*>(from);
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void store_output(const Problem& p, int row, int column, float value) {
  const size_t at = (size_t)column * p.n + row;
#if FLOAT_OUTPUT
  if (p.softcap > 0.f) value = p.softcap * tanhf(value / p.softcap);   // of logits only
  reinterpret_cast<float*>(p.y)[at] = value;
#else
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  reinterpret_cast<u16*>(p.y)[at] = bits;
#endif
}

// The even split of `total` stages between warps: where warp w begins, and which warp has stage i.
__device__ __forceinline__ int split_begin(u32 w, u32 total, u32 warps) { return w * total / warps; }
__device__ __forceinline__ int split_owner(u32 i, u32 total, u32 warps) { return ((i + 1) * warps - 1) / total; }

// A finished sum over this block's slice: the output itself, or a partial sum that the fix-up adds.
template <class Format>
__device__ __forceinline__ void emit(const Problem& p, const Format& format, int tile, int r, int column, float value) {
  const int row = tile * TILE + r;
  if (gridDim.y > 1) {
    p.partial[(((size_t)blockIdx.y * p.tiles + tile) * TILE + r) * p.m + column] = value;
  } else if (row < p.n) {
    store_output(p, row, column, format.epilogue(row, value));
  }
}

// The split-K fix-up: of the blocks that share a chunk of tiles, the one that finishes last adds up the slices' partial sums.
template <class Format>
__device__ __forceinline__ void fix_up_slices(const Problem& p, const Format& format, int tile_begin, int tile_end, int threads) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();   // one for the whole block: the barrier puts every thread's stores before it
    is_last = atomicAdd(p.arrivals + blockIdx.x, 1u) == gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  // Four sums a thread and all slices' loads in flight: each wait is a trip to L2.
  const int float4s = (tile_end - tile_begin) * TILE * p.m / 4;
  const float4* const mine = reinterpret_cast<const float4*>(p.partial + (size_t)tile_begin * TILE * p.m);
  const size_t slice = (size_t)p.tiles * TILE * p.m / 4;
  for (int i = threadIdx.x; i < float4s; i += threads) {
    float value[4] = {0.f, 0.f, 0.f, 0.f};
    for (int first = 0; first < gridDim.y; first += 8) {
      float4 v[8];
#pragma unroll
      for (int s = 0; s < 8; ++s) v[s] = first + s < gridDim.y ? __ldcg(mine + (first + s) * slice + i) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int s = 0; s < 8; ++s) value[0] += v[s].x, value[1] += v[s].y, value[2] += v[s].z, value[3] += v[s].w;
    }
    int row = tile_begin * TILE + i * 4 / p.m, column = i * 4 % p.m;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (row < p.n) store_output(p, row, column, format.epilogue(row, value[j]));
      if (++column == p.m) column = 0, ++row;
    }
  }
  if (threadIdx.x == 0) p.arrivals[blockIdx.x] = 0;
}

template <class Format, int WARPS, int STAGES>
__device__ __forceinline__ void gemv(const Problem& p, Format format) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const codebook = shared;
  u8* const ring_start = codebook + Format::CODEBOOK_BYTES;
  u8* const xs = ring_start + WARPS * STAGES * Format::STAGE_BYTES;
  const int x_row = p.slice_k_blocks * Format::K_BLOCK * 2 + Format::X_PAD;
  float* const partials = reinterpret_cast<float*>(xs + p.m * x_row);   // [warps, 2, 16, m]

  const int warp = threadIdx.x / 32;
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  const int tile_begin = blockIdx.x * (u32)p.tiles / gridDim.x, tile_end = (blockIdx.x + 1) * (u32)p.tiles / gridDim.x;
  const int k_block_begin = blockIdx.y * p.slice_k_blocks;
  const int k_blocks = min(p.slice_k_blocks, p.k_blocks - k_block_begin);
  const int total = (tile_end - tile_begin) * k_blocks;
  const int begin = split_begin(warp, total, WARPS), end = split_begin(warp + 1, total, WARPS);
  int tile = tile_begin + (u32)begin / (u32)k_blocks, k_block = (u32)begin % (u32)k_blocks;

  next_kernel_may_start();
  u8* const ring = ring_start + warp * STAGES * Format::STAGE_BYTES;
  int load_tile = tile, load_k_block = k_block, to_load = end - begin;
  auto load_one = [&](u8* stage) {
    if (to_load > 0) {
      format.load(stage, lane, load_tile, k_block_begin + load_k_block);
      --to_load;
      if (++load_k_block == k_blocks) load_k_block = 0, ++load_tile;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES; ++i) load_one(ring + i * Format::STAGE_BYTES);
  format.fill_codebook(codebook, WARPS * 32);

  typename Format::Scale scale = format.scale(lane, tile, k_block_begin + k_block);

  previous_kernels_done();
  for (int row = 0; row < p.m; ++row) {   // all copies in flight at once: one latency, whatever m
    for (int chunk = threadIdx.x; chunk < k_blocks * Format::K_BLOCK / 8; chunk += WARPS * 32) {
      const int column = k_block_begin * Format::K_BLOCK + chunk * 8;
      const bool valid = column < p.k;
      copy16(xs + row * x_row + chunk * 16, p.x + (size_t)row * p.x_stride + (valid ? column * 2 : 0), valid);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  // Only the lanes of real rows of x load it; the columns past m multiply whatever the registers hold and are never stored.
  const bool has_x = lane.group < p.m;
  const u8* const x_lane = xs + lane.group * x_row + lane.quad * Format::X_LANE;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  int slot = 0;
  bool from_start = k_block == 0;
  for (int i = begin; i < end; ++i) {
    u8* const stage = ring + slot * Format::STAGE_BYTES;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    const typename Format::Fragment fragment = format.fetch(stage, lane);
    __syncwarp();
    load_one(stage);
    const bool tile_done = k_block + 1 == k_blocks;
    const typename Format::Scale next_scale = format.scale(lane, tile + tile_done, k_block_begin + (tile_done ? 0 : k_block + 1));
    format.multiply(fragment, scale, codebook, x_lane + k_block * (Format::K_BLOCK * 2), has_x, lane, sum);
    scale = next_scale;
    ++k_block;
    if (tile_done || i + 1 == end) {
      const int column = lane.quad * 2;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int r = lane.group + (c & 2) * 4, j = column + (c & 1);
        if (j < p.m) {
          if (tile_done && from_start) emit(p, format, tile, r, j, sum[c]);
          else partials[((warp * 2 + from_start) * TILE + r) * p.m + j] = sum[c];
        }
        sum[c] = 0.f;
      }
      from_start = true, k_block = 0, ++tile;
    }
  }
  __syncthreads();

  for (int local = warp; local < tile_end - tile_begin; local += WARPS) {
    const int start = local * k_blocks, first = split_owner(start, total, WARPS), last = split_owner(start + k_blocks - 1, total, WARPS);
    if (first == last) continue;   // one warp had the whole tile and has emitted it
    for (int i = lane.id; i < TILE * p.m; i += 32) {
      const int r = i % TILE, column = i / TILE;
      float value = 0.f;
      for (int w = first; w <= last; ++w) {
        const int w_begin = split_begin(w, total, WARPS);
        if (w_begin == split_begin(w + 1, total, WARPS)) continue;
        value += partials[((w * 2 + (w_begin <= start)) * TILE + r) * p.m + column];
      }
      emit(p, format, tile_begin + local, r, column, value);
    }
  }
  if (gridDim.y > 1) fix_up_slices(p, format, tile_begin, tile_end, WARPS * 32);
}
