// Computes: y = x W^T for a few rows of x and NF4 or FP4 weights (QLoRA, arXiv 2305.14314)
// Shapes: x bf16 [m, k]; codes [tiles, k_blocks, 4, 32, 16 bytes]; scales [tiles, k_blocks, 32, 2]; y bf16 [m, n]
// Runs: linear/four_bit.py (it packs the layout) through linear/gemv.py; also a weight format of the megakernel
// Schedule: that of gemv.cuh; codebook look-ups in shared memory; split-K with a Stream-K fix-up
// Invariants: codes are multiplied unscaled, each block of 64 is scaled in fp32: no rounding of weights to bf16
//
// A scale belongs to 64 columns of a row. It is fp32, or with double quantization (NESTED) one byte, which is expanded here. A
// byte of codes is two neighbouring columns, so one look-up in a codebook of 256 pairs gives a whole register of the matrix
// instruction. The codebook stands 32 times in shared memory, once per bank, so no two lanes ever collide.

struct Format {
  static constexpr int K_BLOCK = 256;                       // columns: four blocks of 64
  static constexpr int CODE_BYTES = TILE * K_BLOCK / 2;
#if NESTED
  static constexpr int SCALE_BYTES = 64;
  struct Scale { float low, high, offset; };   // of the 256 scales that the rows' scales belong to; of the rows' matrix
  struct ScaleCursor { int low, high; float offset; };   // which scales a lane's are, in the order of the checkpoint
#else
  static constexpr int SCALE_BYTES = 256;
  struct Scale {};
  struct ScaleCursor {};
#endif
  static constexpr int STAGE_BYTES = CODE_BYTES + (SCALE_BYTES + 127) / 128 * 128;   // whole rows of banks
  struct Fragment {
    uint4 codes[4];
    float2 scales;
  };
  static constexpr int PAIR_BYTES = 256 * 128;
  static constexpr int CODEBOOK_BYTES = PAIR_BYTES + 1024;
  static constexpr int X_LANE = 32, X_PAD = 16;

  const u8* codes;
  const u8* scales;
  const u32* pairs;      // [256]: bf16 code of the high nibble below, of the low nibble above; then the same in fp16
  const float* byte_map;     // [256] the dynamic 8-bit map
  const float* groups;       // fp32 scale of each 256 scales, in the order of the checkpoint
  float offsets[3];          // the mean of the scales of each matrix that stands here, top to bottom
  int part_tiles[2];         // where the second and the third begin
  int n, blocks, group_last, k_blocks;

  __device__ __forceinline__ int group_of(int row, int block) const {
    return min((min(row, n - 1) * blocks + block) >> 8, group_last);
  }

  // What a lane copies of a stage. The next stage of the tile follows it in memory.
  struct Cursor { const u8 *codes, *scales; };
  __device__ __forceinline__ const u8* codes_of(int tile, int k_block) const { return codes + (size_t)((u32)tile * k_blocks + k_block) * CODE_BYTES; }
  __device__ __forceinline__ Cursor cursor(const Lane& lane, int tile, int k_block) const {
    const u32 at = (u32)tile * k_blocks + k_block;
    return {codes + (size_t)at * CODE_BYTES + lane.id * 16, scales + (size_t)at * SCALE_BYTES + lane.id * 16};
  }
  __device__ __forceinline__ static void advance(Cursor& cursor) { cursor.codes += CODE_BYTES, cursor.scales += SCALE_BYTES; }
  __device__ __forceinline__ void load(u8* stage, const Lane& lane, const Cursor& cursor) const {
#pragma unroll
    for (int b = 0; b < 4; ++b) copy16(stage + b * 512 + lane.id * 16, cursor.codes + b * 512);
    if (lane.id < SCALE_BYTES / 16) copy16(stage + CODE_BYTES + lane.id * 16, cursor.scales);
  }
  __device__ __forceinline__ void load(u8* stage, const Lane& lane, int tile, int k_block) const {
    load(stage, lane, cursor(lane, tile, k_block));
  }

  __device__ __forceinline__ Fragment read(const Lane& lane, int tile, int k_block) const {
    const size_t at = (size_t)tile * k_blocks + k_block;
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

  // Read one stage ahead, through L1: neighbouring stages mostly want the same values.
  __device__ __forceinline__ Scale scale(const Lane& lane, int tile, int k_block) const { return scale(scale_cursor(lane, tile, k_block)); }
  // The same for stages one after another: a tile's first, and each next one.
  __device__ __forceinline__ ScaleCursor scale_cursor(const Lane& lane, int tile, int k_block) const {
#if NESTED
    const int row = tile * TILE + lane.group, block = k_block * 4 + lane.quad;
    const float offset = tile < part_tiles[0] ? offsets[0] : tile < part_tiles[1] ? offsets[1] : offsets[2];
    return {min(row, n - 1) * blocks + block, min(row + 8, n - 1) * blocks + block, offset};
#else
    return {};
#endif
  }
  __device__ __forceinline__ static void advance(ScaleCursor& cursor) {
#if NESTED
    cursor.low += 4, cursor.high += 4;
#endif
  }
  __device__ __forceinline__ Scale scale(const ScaleCursor& cursor) const {
#if NESTED
    return {__ldg(groups + min(cursor.low >> 8, group_last)), __ldg(groups + min(cursor.high >> 8, group_last)), cursor.offset};
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

  // Each thread reads one entry and stores it to its row of 128 bytes, or to half of it. Neighbours begin at different banks.
  __device__ __forceinline__ void fill_codebook(u8* codebook, int threads) const {
    const int parts = threads < 512 ? 1 : 2, chunks = 8 / parts;
    for (int i = threadIdx.x; i < 256 * parts; i += threads) {
      const u32 v = __ldg(pairs + i % 256);
#if NESTED
      if (i < 256) reinterpret_cast<float*>(codebook + PAIR_BYTES)[i] = __ldg(byte_map + i);
#endif
      uint4* const row = reinterpret_cast<uint4*>(codebook) + i % 256 * 8 + i / 256 * chunks;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < chunks) row[(i + j) % chunks] = make_uint4(v, v, v, v);
      }
    }
  }

  // The address of a byte's codebook row is the byte times 128, plus the lane's column. __dp4a computes it in one instruction, and
  // not on the pipe that shifts and masks need.
  template <int BYTE>
  __device__ __forceinline__ static u32 pair(const u8* codebook, u32 lane4, u32 word) {
    return *reinterpret_cast<const u32*>(codebook + __dp4a(word, 128u << 8 * BYTE, lane4));
  }

  // Scales of rows group and group + 8 in block quad.
  __device__ __forceinline__ float2 expand(const Fragment& f, const Scale& group, const u8* codebook) const {
#if NESTED
    const u32 bytes = __float_as_uint(f.scales.x);
    const float* const map = reinterpret_cast<const float*>(codebook + PAIR_BYTES);
    return make_float2(map[bytes & 255] * group.low + group.offset, map[bytes >> 8] * group.high + group.offset);
#else
    return f.scales;
#endif
  }

  // The operands of the four matrix instructions of a block: its codes, unscaled.
  __device__ __forceinline__ static void operands(const uint4& q, const u8* codebook, u32 lane4, u32 (&a)[4][4]) {
    a[0][0] = pair<0>(codebook, lane4, q.x), a[0][1] = pair<0>(codebook, lane4, q.z);
    a[0][2] = pair<1>(codebook, lane4, q.x), a[0][3] = pair<1>(codebook, lane4, q.z);
    a[1][0] = pair<2>(codebook, lane4, q.x), a[1][1] = pair<2>(codebook, lane4, q.z);
    a[1][2] = pair<3>(codebook, lane4, q.x), a[1][3] = pair<3>(codebook, lane4, q.z);
    a[2][0] = pair<0>(codebook, lane4, q.y), a[2][1] = pair<0>(codebook, lane4, q.w);
    a[2][2] = pair<1>(codebook, lane4, q.y), a[2][3] = pair<1>(codebook, lane4, q.w);
    a[3][0] = pair<2>(codebook, lane4, q.y), a[3][1] = pair<2>(codebook, lane4, q.w);
    a[3][2] = pair<3>(codebook, lane4, q.y), a[3][3] = pair<3>(codebook, lane4, q.w);
  }
  __device__ __forceinline__ static void multiply_operands(const u32 (&a)[4][4], const uint4& xa, const uint4& xb, float (&d)[4]) {
    mma_m16n8k16(d, a[0][0], a[0][1], a[0][2], a[0][3], xa.x, xa.y);
    mma_m16n8k16(d, a[1][0], a[1][1], a[1][2], a[1][3], xa.z, xa.w);
    mma_m16n8k16(d, a[2][0], a[2][1], a[2][2], a[2][3], xb.x, xb.y);
    mma_m16n8k16(d, a[3][0], a[3][1], a[3][2], a[3][3], xb.z, xb.w);
  }

  // d = a block's codes, unscaled, times the x that this lane's quad holds.
  __device__ __forceinline__ static void multiply_block(const uint4& q, const uint4& xa, const uint4& xb, const u8* codebook, u32 lane4,
                                                        float (&d)[4]) {
    u32 a[4][4];
    operands(q, codebook, lane4, a);
    d[0] = d[1] = d[2] = d[3] = 0.f;
    multiply_operands(a, xa, xb, d);
  }

  // Adds block b times each group of eight rows of x. `scales` are those of the lane's own quad.
  template <int GROUPS>
  __device__ __forceinline__ static void add_block(const Fragment& f, int b, const float2& scales, const uint4 (&xa)[GROUPS],
                                                   const uint4 (&xb)[GROUPS], const u8* codebook, const Lane& lane, float (&sum)[GROUPS][4]) {
    u32 a[4][4];
    operands(f.codes[b], codebook, lane.id * 4, a);
    const float low = __shfl_sync(0xffffffffu, scales.x, (lane.id & 28) + b);
    const float high = __shfl_sync(0xffffffffu, scales.y, (lane.id & 28) + b);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      multiply_operands(a, xa[g], xb[g], d);
      sum[g][0] += d[0] * low, sum[g][1] += d[1] * low, sum[g][2] += d[2] * high, sum[g][3] += d[3] * high;
    }
  }

  __device__ __forceinline__ void multiply(const Fragment& f, const Scale& group, const u8* codebook, const u8* x, bool has_x,
                                           const Lane& lane, float (&sum)[4]) const {
    const float2 scales = expand(f, group, codebook);
    float (&one)[1][4] = reinterpret_cast<float (&)[1][4]>(sum);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      uint4 xa[1] = {make_uint4(0, 0, 0, 0)}, xb[1] = {xa[0]};
      fetch_x(xa[0], x + b * 128, has_x);
      fetch_x(xb[0], x + b * 128 + 16, has_x);
      add_block(f, b, scales, xa, xb, codebook, lane, one);
    }
  }

  // The same with x in registers.
  template <int GROUPS>
  __device__ __forceinline__ void multiply_held(const Fragment& f, const Scale& group, const uint4 (&xa)[4][GROUPS],
                                                const uint4 (&xb)[4][GROUPS], const u8* codebook, const Lane& lane,
                                                float (&sum)[GROUPS][4]) const {
    const float2 scales = expand(f, group, codebook);
#pragma unroll
    for (int b = 0; b < 4; ++b) add_block(f, b, scales, xa[b], xb[b], codebook, lane, sum);
  }

  // One row of x, at `x` for this k_block. Column 2b of the matrix instruction holds its block b; the lanes of quad b read the
  // result there, and they have block b's scales too. The four quads' sums together are the result.
  __device__ __forceinline__ void multiply_row(const Fragment& f, const Scale& group, const u8* codebook, const u8* x, const Lane& lane,
                                               float (&sum)[4]) const {
    const float2 scales = expand(f, group, codebook);
    const uint4* const from = reinterpret_cast<const uint4*>(x + (lane.group >> 1) * 128 + lane.quad * X_LANE);
    const uint4 xa = from[0], xb = from[1];
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      float d[4];
      multiply_block(f.codes[b], xa, xb, codebook, lane.id * 4, d);
      if (lane.quad == b) low = d[0], high = d[2];
    }
    sum[0] += low * scales.x, sum[2] += high * scales.y;
  }

  // Prefetches into L2 what `scale` will want for a tile: memory takes longer than the one stage that it is read ahead.
  __device__ __forceinline__ void fetch_scales(const Lane& lane, int tile) const {
#if NESTED
    const int at = group_of(tile * TILE, 0) + lane.id * 8;
    if (at <= group_of(tile * TILE + TILE - 1, blocks - 1)) asm volatile("prefetch.global.L2 [%0];" ::"l"(groups + at));
#endif
  }
  __device__ __forceinline__ float row_scale(int) const { return 1.f; }

  __device__ __forceinline__ float epilogue(int, float value) const { return value; }
};

#if defined(FIXED_K_BLOCKS) && FIXED_K_BLOCKS == 0
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
four_bit_gemv(Problem problem, Format format) { gemv<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
#endif
