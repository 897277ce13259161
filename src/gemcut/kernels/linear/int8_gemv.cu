// Computes: y = x W^T for a few rows of x and int8 weights with one fp32 scale a row, as stored
// Shapes: x bf16 [m, k], m from 1 to 8; W int8 [n, k] row-major, scales fp32 [n]; y bf16 or fp32 [m, n]
// Runs: linear/int8.py through linear/gemv.py; also a weight format of the megakernel
// Schedule: that of gemv.cuh: persistent GEMV, split-K with a Stream-K fix-up; the scale is applied in the epilogue
// Invariants: every int8 value is exact in bf16, so only the fp32 sums and the output are rounded; x stays bf16

struct Format : RowMajor<Format> {
  static constexpr int K_BLOCK = 128;
  static constexpr int X_LANE = 32, X_PAD = 16;

  const u8* weight;          // [n, k]
  const float* scales;       // [n]
  int n, k;

  __device__ __forceinline__ long long row_bytes() const { return k; }

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
  __device__ __forceinline__ Fragment read(const Lane& lane, int tile, int k_block) const {
    Fragment f;
#pragma unroll
    for (int b = 0; b < K_BLOCK / 64; ++b) {
      const int column = k_block * K_BLOCK + b * 64 + lane.quad * 16, row = tile * TILE + lane.group;
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
    for (int b = 0; b < K_BLOCK / 64; ++b) {
      const uint4 low = f.low[b], high = f.high[b];
      uint4 xa = make_uint4(0, 0, 0, 0), xb = xa;
      fetch_x(xa, x + b * 128, has_x);
      fetch_x(xb, x + b * 128 + 16, has_x);
      mma_m16n8k16(sum, pair<0x4140>(low.x), pair<0x4140>(high.x), pair<0x4342>(low.x), pair<0x4342>(high.x), xa.x, xa.y);
      mma_m16n8k16(sum, pair<0x4140>(low.y), pair<0x4140>(high.y), pair<0x4342>(low.y), pair<0x4342>(high.y), xa.z, xa.w);
      mma_m16n8k16(sum, pair<0x4140>(low.z), pair<0x4140>(high.z), pair<0x4342>(low.z), pair<0x4342>(high.z), xb.x, xb.y);
      mma_m16n8k16(sum, pair<0x4140>(low.w), pair<0x4140>(high.w), pair<0x4342>(low.w), pair<0x4342>(high.w), xb.z, xb.w);
    }
  }

  // The same with x in registers, for groups of eight rows of it.
  template <int GROUPS>
  __device__ __forceinline__ void multiply_held(const Fragment& f, const Scale&, const uint4 (&xa)[2][GROUPS], const uint4 (&xb)[2][GROUPS],
                                                const u8*, const Lane&, float (&sum)[GROUPS][4]) const {
#pragma unroll
    for (int b = 0; b < K_BLOCK / 64; ++b) {
      const u32 low[4] = {f.low[b].x, f.low[b].y, f.low[b].z, f.low[b].w}, high[4] = {f.high[b].x, f.high[b].y, f.high[b].z, f.high[b].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 a0 = pair<0x4140>(low[i]), a1 = pair<0x4140>(high[i]), a2 = pair<0x4342>(low[i]), a3 = pair<0x4342>(high[i]);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          const uint4& x = i < 2 ? xa[b][g] : xb[b][g];
          mma_m16n8k16(sum[g], a0, a1, a2, a3, i % 2 == 0 ? x.x : x.z, i % 2 == 0 ? x.y : x.w);
        }
      }
    }
  }

  __device__ __forceinline__ float row_scale(int row) const { return __ldg(scales + row); }

  __device__ __forceinline__ float epilogue(int row, float value) const { return value * row_scale(row); }
};

#if defined(FIXED_K_BLOCKS) && FIXED_K_BLOCKS == 0
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
int8_gemv(Problem problem, Format format) { gemv<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
#endif
