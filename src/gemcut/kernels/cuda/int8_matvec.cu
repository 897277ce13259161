// W in int8 with one fp32 scale per row, as stored (row-major): the same bytes serve as an embedding table.
// Every int8 value is exact in bf16, so the only roundings are the fp32 sums' and the output's.

struct Format {
  static constexpr int STEP = 128;
  static constexpr int STAGE_BYTES = TILE * STEP;
  static constexpr int TABLE_BYTES = 0;
  static constexpr int X_LANE = 32, X_PAD = 16;

  const u8* weight;          // [n, k]
  const float* scales;       // [n]
  int n, k;

  __device__ __forceinline__ void load(u8* stage, const Lane& lane, int tile, int step) const {
    const int row = tile * TILE + lane.group, column = step * STEP + lane.quad * 16;
    const u8* const low = weight + (size_t)min(row, n - 1) * k;
    const u8* const high = weight + (size_t)min(row + 8, n - 1) * k;
#pragma unroll
    for (int b = 0; b < STEP / 64; ++b) {
      const bool valid = column + b * 64 < k;
      const int at = valid ? column + b * 64 : 0;
      copy16(stage + b * 1024 + lane.id * 16, low + at, valid);
      copy16(stage + b * 1024 + 512 + lane.id * 16, high + at, valid);
    }
  }

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

  __device__ __forceinline__ void multiply(const u8* stage, const u8*, const u8* x, const Lane& lane, float (&sum)[4]) const {
#pragma unroll
    for (int b = 0; b < STEP / 64; ++b) {
      const uint4 low = *reinterpret_cast<const uint4*>(stage + b * 1024 + lane.id * 16);
      const uint4 high = *reinterpret_cast<const uint4*>(stage + b * 1024 + 512 + lane.id * 16);
      const uint4 xa = *reinterpret_cast<const uint4*>(x + b * 128);
      const uint4 xb = *reinterpret_cast<const uint4*>(x + b * 128 + 16);
      multiply_add(sum, pair<0x4140>(low.x), pair<0x4140>(high.x), pair<0x4342>(low.x), pair<0x4342>(high.x), xa.x, xa.y);
      multiply_add(sum, pair<0x4140>(low.y), pair<0x4140>(high.y), pair<0x4342>(low.y), pair<0x4342>(high.y), xa.z, xa.w);
      multiply_add(sum, pair<0x4140>(low.z), pair<0x4140>(high.z), pair<0x4342>(low.z), pair<0x4342>(high.z), xb.x, xb.y);
      multiply_add(sum, pair<0x4140>(low.w), pair<0x4140>(high.w), pair<0x4342>(low.w), pair<0x4342>(high.w), xb.z, xb.w);
    }
  }

  __device__ __forceinline__ float finish(int row, float value) const { return value * __ldg(scales + row); }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
int8_matvec(Problem problem, Format format) { run<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
