// W in bf16 as stored (row-major): the same bytes serve as an embedding table. No decoding at all.

struct Format {
  static constexpr int STEP = 64;
  static constexpr int STAGE_BYTES = TILE * STEP * 2;
  static constexpr int TABLE_BYTES = 0;
  static constexpr int X_LANE = 16, X_PAD = 64;

  const u8* weight;          // [n, k]
  int n, k;

  __device__ __forceinline__ void load(u8* stage, const Lane& lane, int tile, int step) const {
    const int row = tile * TILE + lane.group, column = step * STEP + lane.quad * 8;
    const u8* const low = weight + (size_t)min(row, n - 1) * k * 2;
    const u8* const high = weight + (size_t)min(row + 8, n - 1) * k * 2;
#pragma unroll
    for (int b = 0; b < STEP / 32; ++b) {
      const bool valid = column + b * 32 < k;
      const int at = valid ? (column + b * 32) * 2 : 0;
      copy16(stage + b * 1024 + lane.id * 16, low + at, valid);
      copy16(stage + b * 1024 + 512 + lane.id * 16, high + at, valid);
    }
  }

  __device__ __forceinline__ void fill_tables(u8*, int) const {}

  __device__ __forceinline__ void multiply(const u8* stage, const u8*, const u8* x, const Lane& lane, float (&sum)[4]) const {
#pragma unroll
    for (int b = 0; b < STEP / 32; ++b) {
      const uint4 low = *reinterpret_cast<const uint4*>(stage + b * 1024 + lane.id * 16);
      const uint4 high = *reinterpret_cast<const uint4*>(stage + b * 1024 + 512 + lane.id * 16);
      const uint4 xv = *reinterpret_cast<const uint4*>(x + b * 64);
      multiply_add(sum, low.x, high.x, low.y, high.y, xv.x, xv.y);
      multiply_add(sum, low.z, high.z, low.w, high.w, xv.z, xv.w);
    }
  }

  __device__ __forceinline__ float finish(int, float value) const { return value; }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
bf16_matvec(Problem problem, Format format) { run<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
