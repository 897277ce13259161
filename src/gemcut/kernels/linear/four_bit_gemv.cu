// W in 4-bit codes with one scale per 64 columns (NF4 or FP4; the scale fp32, or one byte expanded here).
//
// Codes [tiles, steps, 4 blocks, 32 lanes, 16 bytes], scales [tiles, steps, 32 lanes, 2 rows]: gemcut.kernels.linear.four_bit packs them.
// A byte is two neighbouring columns, so one look-up in a table of 256 pairs gives a whole register of the matrix
// instruction. The table stands 32 times in shared memory, once per bank, so no two lanes ever collide.
// Codes are multiplied unscaled and each block of 64 is scaled in fp32: one rounding less than decoding to bf16.

struct Format {
  static constexpr int STEP = 256;                       // columns: four blocks of 64
  static constexpr int CODE_BYTES = TILE * STEP / 2;
#if NESTED
  static constexpr int SCALE_BYTES = 64;
  struct Scale { float low, high, offset; };   // of the 256 scales that the rows' scales belong to; of the rows' matrix
  struct ScalePlace { int low, high; float offset; };   // which scales a lane's are, in the order of the checkpoint
#else
  static constexpr int SCALE_BYTES = 256;
  struct Scale {};
  struct ScalePlace {};
#endif
  static constexpr int STAGE_BYTES = CODE_BYTES + (SCALE_BYTES + 127) / 128 * 128;   // whole rows of banks
  struct Fragment {
    uint4 codes[4];
    float2 scales;
  };
  static constexpr int PAIR_BYTES = 256 * 128;
  static constexpr int TABLE_BYTES = PAIR_BYTES + 1024;
  static constexpr int X_LANE = 32, X_PAD = 16;

  const u8* codes;
  const u8* scales;
  const u32* pairs;      // [256]: bf16 code of the high nibble below, of the low nibble above; then the same in fp16
  const float* byte_map;     // [256] the dynamic 8-bit map
  const float* groups;       // fp32 scale of each 256 scales, in the order of the checkpoint
  float offsets[3];          // the mean of the scales of each matrix that stands here, top to bottom
  int part_tiles[2];         // where the second and the third begin
  int n, blocks, group_last, steps;

  __device__ __forceinline__ int group_of(int row, int block) const {
    return min((min(row, n - 1) * blocks + block) >> 8, group_last);
  }

  // What a lane copies of a stage; the next stage of the tile follows it.
  struct Place { const u8 *codes, *scales; };
  __device__ __forceinline__ Place place(const Lane& lane, int tile, int step) const {
    const u32 at = (u32)tile * steps + step;
    return {codes + (size_t)at * CODE_BYTES + lane.id * 16, scales + (size_t)at * SCALE_BYTES + lane.id * 16};
  }
  __device__ __forceinline__ static void next(Place& place) { place.codes += CODE_BYTES, place.scales += SCALE_BYTES; }
  __device__ __forceinline__ void load(u8* stage, const Lane& lane, const Place& place) const {
#pragma unroll
    for (int b = 0; b < 4; ++b) copy16(stage + b * 512 + lane.id * 16, place.codes + b * 512);
    if (lane.id < SCALE_BYTES / 16) copy16(stage + CODE_BYTES + lane.id * 16, place.scales);
  }
  __device__ __forceinline__ void load(u8* stage, const Lane& lane, int tile, int step) const {
    load(stage, lane, place(lane, tile, step));
  }

  __device__ __forceinline__ Fragment read(const Lane& lane, int tile, int step) const {
    const size_t at = (size_t)tile * steps + step;
    Fragment f;
#pragma unroll
    for (int b = 0; b < 4; ++b) f.codes[b] = read16(codes + at * CODE_BYTES + b * 512 + lane.id * 16);
#if NESTED
    f.scales.x = __uint_as_float(__ldg(reinterpret_cast<const u16*>(scales + at * SCALE_BYTES) + lane.id));
#else
    f.scales = __ldg(reinterpret_cast<const float2*>(scales + at * SCALE_BYTES) + lane.id);
#endif
    return f;
  }

  // Read one stage ahead, through the first-level cache: neighbouring stages mostly want the same values.
  __device__ __forceinline__ Scale scale(const Lane& lane, int tile, int step) const { return scale(scale_place(lane, tile, step)); }
  // The same for stages one after another: a tile's first, and each next one.
  __device__ __forceinline__ ScalePlace scale_place(const Lane& lane, int tile, int step) const {
#if NESTED
    const int row = tile * TILE + lane.group, block = step * 4 + lane.quad;
    const float offset = tile < part_tiles[0] ? offsets[0] : tile < part_tiles[1] ? offsets[1] : offsets[2];
    return {min(row, n - 1) * blocks + block, min(row + 8, n - 1) * blocks + block, offset};
#else
    return {};
#endif
  }
  __device__ __forceinline__ static void next(ScalePlace& place) {
#if NESTED
    place.low += 4, place.high += 4;
#endif
  }
  __device__ __forceinline__ Scale scale(const ScalePlace& place) const {
#if NESTED
    return {__ldg(groups + min(place.low >> 8, group_last)), __ldg(groups + min(place.high >> 8, group_last)), place.offset};
#else
    return {};
#endif
  }

  __device__ __forceinline__ Fragment fetch(const u8* stage, const Lane& lane) const {
    Fragment f;
#pragma unroll
    for (int b = 0; b < 4; ++b) f.codes[b] = *reinterpret_cast<const uint4*>(stage + b * 512 + lane.id * 16);
#if NESTED
    f.scales.x = __uint_as_float(*reinterpret_cast<const u16*>(stage + CODE_BYTES + lane.id * 2));
#else
    f.scales = *reinterpret_cast<const float2*>(stage + CODE_BYTES + lane.id * 8);
#endif
    return f;
  }

  // One read a thread, whose value it stores to its row of 128 bytes, or to half of it; neighbours begin at different banks.
  __device__ __forceinline__ void fill_tables(u8* tables, int threads) const {
    const int parts = threads < 512 ? 1 : 2, chunks = 8 / parts;
    for (int i = threadIdx.x; i < 256 * parts; i += threads) {
      const u32 v = __ldg(pairs + i % 256);
#if NESTED
      if (i < 256) reinterpret_cast<float*>(tables + PAIR_BYTES)[i] = __ldg(byte_map + i);
#endif
      uint4* const row = reinterpret_cast<uint4*>(tables) + i % 256 * 8 + i / 256 * chunks;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < chunks) row[(i + j) % chunks] = make_uint4(v, v, v, v);
      }
    }
  }

  // The table's row of a byte is its value times 128, beside the lane's column: a sum of products of bytes is one instruction,
  // and not one of the pipe that shifts and masks need.
  template <int BYTE>
  __device__ __forceinline__ static u32 pair(const u8* tables, u32 lane4, u32 word) {
    return *reinterpret_cast<const u32*>(tables + __dp4a(word, 128u << 8 * BYTE, lane4));
  }

  // Scales of rows group and group + 8 in block quad.
  __device__ __forceinline__ float2 expand(const Fragment& f, const Scale& group, const u8* tables) const {
#if NESTED
    const u32 bytes = __float_as_uint(f.scales.x);
    const float* const map = reinterpret_cast<const float*>(tables + PAIR_BYTES);
    return make_float2(map[bytes & 255] * group.low + group.offset, map[bytes >> 8] * group.high + group.offset);
#else
    return f.scales;
#endif
  }

  // What the four matrix instructions of a block take for its codes, unscaled.
  __device__ __forceinline__ static void operands(const uint4& q, const u8* tables, u32 lane4, u32 (&a)[4][4]) {
    a[0][0] = pair<0>(tables, lane4, q.x), a[0][1] = pair<0>(tables, lane4, q.z);
    a[0][2] = pair<1>(tables, lane4, q.x), a[0][3] = pair<1>(tables, lane4, q.z);
    a[1][0] = pair<2>(tables, lane4, q.x), a[1][1] = pair<2>(tables, lane4, q.z);
    a[1][2] = pair<3>(tables, lane4, q.x), a[1][3] = pair<3>(tables, lane4, q.z);
    a[2][0] = pair<0>(tables, lane4, q.y), a[2][1] = pair<0>(tables, lane4, q.w);
    a[2][2] = pair<1>(tables, lane4, q.y), a[2][3] = pair<1>(tables, lane4, q.w);
    a[3][0] = pair<2>(tables, lane4, q.y), a[3][1] = pair<2>(tables, lane4, q.w);
    a[3][2] = pair<3>(tables, lane4, q.y), a[3][3] = pair<3>(tables, lane4, q.w);
  }
  __device__ __forceinline__ static void multiply_operands(const u32 (&a)[4][4], const uint4& xa, const uint4& xb, float (&d)[4]) {
    multiply_add(d, a[0][0], a[0][1], a[0][2], a[0][3], xa.x, xa.y);
    multiply_add(d, a[1][0], a[1][1], a[1][2], a[1][3], xa.z, xa.w);
    multiply_add(d, a[2][0], a[2][1], a[2][2], a[2][3], xb.x, xb.y);
    multiply_add(d, a[3][0], a[3][1], a[3][2], a[3][3], xb.z, xb.w);
  }

  // d = a block's codes, unscaled, times the x that this lane's quarter holds.
  __device__ __forceinline__ static void multiply_block(const uint4& q, const uint4& xa, const uint4& xb, const u8* tables, u32 lane4,
                                                        float (&d)[4]) {
    u32 a[4][4];
    operands(q, tables, lane4, a);
    d[0] = d[1] = d[2] = d[3] = 0.f;
    multiply_operands(a, xa, xb, d);
  }

  // Adds the product of each group of eight rows of x with block b; `scales` are those of the lane's own quarter.
  template <int GROUPS>
  __device__ __forceinline__ static void add_block(const Fragment& f, int b, const float2& scales, const uint4 (&xa)[GROUPS],
                                                   const uint4 (&xb)[GROUPS], const u8* tables, const Lane& lane, float (&sum)[GROUPS][4]) {
    u32 a[4][4];
    operands(f.codes[b], tables, lane.id * 4, a);
    const float low = __shfl_sync(0xffffffffu, scales.x, (lane.id & 28) + b);
    const float high = __shfl_sync(0xffffffffu, scales.y, (lane.id & 28) + b);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      multiply_operands(a, xa[g], xb[g], d);
      sum[g][0] += d[0] * low, sum[g][1] += d[1] * low, sum[g][2] += d[2] * high, sum[g][3] += d[3] * high;
    }
  }

  __device__ __forceinline__ void multiply(const Fragment& f, const Scale& group, const u8* tables, const u8* x, bool has_x,
                                           const Lane& lane, float (&sum)[4]) const {
    const float2 scales = expand(f, group, tables);
    float (&one)[1][4] = reinterpret_cast<float (&)[1][4]>(sum);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      uint4 xa[1] = {make_uint4(0, 0, 0, 0)}, xb[1] = {xa[0]};
      fetch_x(xa[0], x + b * 128, has_x);
      fetch_x(xb[0], x + b * 128 + 16, has_x);
      add_block(f, b, scales, xa, xb, tables, lane, one);
    }
  }

  // The same with x in registers.
  template <int GROUPS>
  __device__ __forceinline__ void multiply_held(const Fragment& f, const Scale& group, const uint4 (&xa)[4][GROUPS],
                                                const uint4 (&xb)[4][GROUPS], const u8* tables, const Lane& lane,
                                                float (&sum)[GROUPS][4]) const {
    const float2 scales = expand(f, group, tables);
#pragma unroll
    for (int b = 0; b < 4; ++b) add_block(f, b, scales, xa[b], xb[b], tables, lane, sum);
  }

  // One row of x, at `x` for this step: column 2b of the matrix instruction holds its block b, which is where the lanes of
  // quad b look, and they have block b's scales too. What all four quads add to `sum` is the product.
  __device__ __forceinline__ void multiply_row(const Fragment& f, const Scale& group, const u8* tables, const u8* x, const Lane& lane,
                                               float (&sum)[4]) const {
    const float2 scales = expand(f, group, tables);
    const uint4* const from = reinterpret_cast<const uint4*>(x + (lane.group >> 1) * 128 + lane.quad * X_LANE);
    const uint4 xa = from[0], xb = from[1];
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      float d[4];
      multiply_block(f.codes[b], xa, xb, tables, lane.id * 4, d);
      if (lane.quad == b) low = d[0], high = d[2];
    }
    sum[0] += low * scales.x, sum[2] += high * scales.y;
  }

  // Has the second-level cache fetch what `scale` will want for a tile: memory takes longer than the one stage it is read ahead.
  __device__ __forceinline__ void fetch_scales(const Lane& lane, int tile) const {
#if NESTED
    const int at = group_of(tile * TILE, 0) + lane.id * 8;
    if (at <= group_of(tile * TILE + TILE - 1, blocks - 1)) asm volatile("prefetch.global.L2 [%0];" ::"l"(groups + at));
#endif
  }
  __device__ __forceinline__ float row_scale(int) const { return 1.f; }

  __device__ __forceinline__ float finish(int, float value) const { return value; }
};

#if defined(FIXED_STEPS) && FIXED_STEPS == 0
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
four_bit_gemv(Problem problem, Format format) { run<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
#endif
