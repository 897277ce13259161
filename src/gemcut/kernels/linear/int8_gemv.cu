// W in int8 with one fp32 scale per row, as stored (row-major): the same bytes serve as an embedding table.
// Every int8 value is exact in bf16, so the only roundings are the fp32 sums' and the output's.

struct Format {
  static constexpr int STEP = 128;
  static constexpr int STAGE_BYTES = ROW_STAGE;
  static constexpr int TABLE_BYTES = 0;
  static constexpr int X_LANE = 32, X_PAD = 16;

  using Fragment = RowFragment;
  struct Scale {};
  struct ScalePlace {};

  const u8* weight;          // [n, k]
  const float* scales;       // [n]
  int n, k;

  __device__ __forceinline__ void load(u8* stage, const Lane& lane, int tile, int step) const {
    load_rows(stage, lane.id, weight, tile * TILE, n, k, step * 128LL);
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

  // Two bytes to two bf16. With v = low seven bits - 128 * sign: (128 + low seven bits) - (128 or 256), both exact bit patterns.
  template <int SELECT>
  __device__ __forceinline__ static u32 pair(u32 word) {
    u32 spread, value;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(spread) : "r"(word), "n"(SELECT));
    const u32 magnitude = (spread & 0x007f007fu) | 0x43004300u, sign = (spread & 0x00800080u) | 0x43004300u;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(value) : "r"(sign), "r"(0xbf80bf80u), "r"(magnitude));
    return value;
  }

  // The fragment of a stage from memory: 64 bytes of each row at a time; rows past n: any, they are not stored.
  __device__ __forceinline__ Fragment read(const Lane& lane, int tile, int step) const {
    Fragment f;
#pragma unroll
    for (int b = 0; b < STEP / 64; ++b) {
      const int column = step * STEP + b * 64 + lane.quad * 16, row = tile * TILE + lane.group;
      f.low[b] = f.high[b] = make_uint4(0, 0, 0, 0);
      if (column < k) {
        f.low[b] = read16(weight + (long long)min(row, n - 1) * k + column);
        f.high[b] = read16(weight + (long long)min(row + 8, n - 1) * k + column);
      }
    }
    return f;
  }

  __device__ __forceinline__ void multiply(const Fragment& f, const Scale&, const u8*, const u8* x, bool has_x, const Lane&,
                                           float (&sum)[4]) const {
#pragma unroll
    for (int b = 0; b < STEP / 64; ++b) {
      const uint4 low = f.low[b], high = f.high[b];
      uint4 xa = make_uint4(0, 0, 0, 0), xb = xa;
      fetch_x(xa, x + b * 128, has_x);
      fetch_x(xb, x + b * 128 + 16, has_x);
      multiply_add(sum, pair<0x4140>(low.x), pair<0x4140>(high.x), pair<0x4342>(low.x), pair<0x4342>(high.x), xa.x, xa.y);
      multiply_add(sum, pair<0x4140>(low.y), pair<0x4140>(high.y), pair<0x4342>(low.y), pair<0x4342>(high.y), xa.z, xa.w);
      multiply_add(sum, pair<0x4140>(low.z), pair<0x4140>(high.z), pair<0x4342>(low.z), pair<0x4342>(high.z), xb.x, xb.y);
      multiply_add(sum, pair<0x4140>(low.w), pair<0x4140>(high.w), pair<0x4342>(low.w), pair<0x4342>(high.w), xb.z, xb.w);
    }
  }

  // The same with x in registers, for groups of eight rows of it.
  template <int GROUPS>
  __device__ __forceinline__ void multiply_held(const Fragment& f, const Scale&, const uint4 (&xa)[2][GROUPS], const uint4 (&xb)[2][GROUPS],
                                                const u8*, const Lane&, float (&sum)[GROUPS][4]) const {
#pragma unroll
    for (int b = 0; b < STEP / 64; ++b) {
      const u32 low[4] = {f.low[b].x, f.low[b].y, f.low[b].z, f.low[b].w}, high[4] = {f.high[b].x, f.high[b].y, f.high[b].z, f.high[b].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 a0 = pair<0x4140>(low[i]), a1 = pair<0x4140>(high[i]), a2 = pair<0x4342>(low[i]), a3 = pair<0x4342>(high[i]);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          const uint4& x = i < 2 ? xa[b][g] : xb[b][g];
          multiply_add(sum[g], a0, a1, a2, a3, i % 2 == 0 ? x.x : x.z, i % 2 == 0 ? x.y : x.w);
        }
      }
    }
  }

  // As in four_bit_gemv.cu: the quads without x add zero.
  __device__ __forceinline__ void multiply_row(const Fragment& f, const Scale& s, const u8* tables, const u8* x, const Lane& lane,
                                               float (&sum)[4]) const {
    multiply(f, s, tables, x + lane.quad * X_LANE, lane.group == 0, lane, sum);
  }
  __device__ __forceinline__ void fetch_scales(const Lane&, int) const {}
  __device__ __forceinline__ float row_scale(int row) const { return __ldg(scales + row); }

  __device__ __forceinline__ float finish(int row, float value) const { return value * row_scale(row); }
};

#if defined(FIXED_STEPS) && FIXED_STEPS == 0
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
int8_gemv(Problem problem, Format format) { run<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
#endif
