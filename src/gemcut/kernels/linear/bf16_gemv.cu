// W in bf16 as stored (row-major): the same bytes serve as an embedding table. No decoding at all.

struct Format {
  static constexpr int STEP = 64;
  static constexpr int STAGE_BYTES = ROW_STAGE;
  static constexpr int TABLE_BYTES = 0;
  static constexpr int X_LANE = 16, X_PAD = 64;

  using Fragment = RowFragment;
  struct Scale {};
  struct ScalePlace {};

  const u8* weight;          // [n, k]
  int n, k;

  __device__ __forceinline__ void load(u8* stage, const Lane& lane, int tile, int step) const {
    load_rows(stage, lane.id, weight, tile * TILE, n, 2LL * k, step * 128LL);
  }

  struct Place { int tile, step; };
  __device__ __forceinline__ Place place(const Lane&, int tile, int step) const { return {tile, step}; }
  __device__ __forceinline__ static void next(Place& place) { ++place.step; }
  __device__ __forceinline__ void load(u8* stage, const Lane& lane, const Place& place) const { load(stage, lane, place.tile, place.step); }
  __device__ __forceinline__ ScalePlace scale_place(const Lane&, int, int) const { return {}; }
  __device__ __forceinline__ static void next(ScalePlace&) {}
  __device__ __forceinline__ Scale scale(const ScalePlace&) const { return {}; }
  __device__ __forceinline__ Scale scale(const Lane&, int, int) const { return {}; }

  __device__ __forceinline__ Fragment fetch(const u8* stage, const Lane& lane) const { return fetch_rows(stage, lane); }

  __device__ __forceinline__ void fill_tables(u8*, int) const {}

  __device__ __forceinline__ void multiply(const Fragment& f, const Scale&, const u8*, const u8* x, bool has_x, const Lane&,
                                           float (&sum)[4]) const {
#pragma unroll
    for (int b = 0; b < STEP / 32; ++b) {
      const uint4 low = f.low[b], high = f.high[b];
      uint4 xv = make_uint4(0, 0, 0, 0);
      fetch_x(xv, x + b * 64, has_x);
      multiply_add(sum, low.x, high.x, low.y, high.y, xv.x, xv.y);
      multiply_add(sum, low.z, high.z, low.w, high.w, xv.z, xv.w);
    }
  }

  // As in four_bit_gemv.cu: the quads without x add zero.
  __device__ __forceinline__ void multiply_row(const Fragment& f, const Scale& s, const u8* tables, const u8* x, const Lane& lane,
                                               float (&sum)[4]) const {
    multiply(f, s, tables, x + lane.quad * X_LANE, lane.group == 0, lane, sum);
  }
  __device__ __forceinline__ void fetch_scales(const Lane&, int) const {}
  __device__ __forceinline__ float row_scale(int) const { return 1.f; }

  __device__ __forceinline__ float finish(int, float value) const { return value; }
};

#if defined(FIXED_STEPS) && FIXED_STEPS == 0
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
bf16_gemv(Problem problem, Format format) { run<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
#endif
