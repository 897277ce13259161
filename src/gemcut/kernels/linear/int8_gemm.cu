// Computes: y = x W^T of int8 weights for 9 to 1,792 rows: W as wgmma's register operand in gemm.cuh
// Shapes: x bf16 in the layout of layout.cuh; W int8 [n, k] row-major, scales fp32 [n]; y bf16 or fp32 [m, n]
// Runs: linear/gemm.py on Hopper; linear/routes.py says for how many rows
// Schedule: that of gemm.cuh; int8 is widened to bf16 in registers; the row's scale is applied in the epilogue
// Invariants: every int8 value is exact in bf16. Compiled after int8_gemv.cu and gemm.cuh

struct Operand {
  static constexpr bool SCALED_AFTER = false, PRODUCED = false;
  static constexpr int CODE_BYTES = Format::STAGE_BYTES, STAGE_BYTES = CODE_BYTES;
  uint4 low, high;

  __device__ __forceinline__ Operand(const u8* stage, const Lane& lane, int b) {
    const u8* const from = stage + lane.group * 128 + ((b * 4 + lane.quad) ^ (lane.group & 1) * 4) * 16;
    low = *reinterpret_cast<const uint4*>(from);
    high = *reinterpret_cast<const uint4*>(from + 8 * 128);
  }

  __device__ __forceinline__ static void fill_codebook(const Format&, u8*, int) {}
  __device__ __forceinline__ static float2 scales(const Format&, const u8*, const Lane&, const Format::Scale&, const u8*) { return {}; }
  __device__ __forceinline__ static float2 of_block(const float2&, const Lane&, int) { return {}; }

  // The operand of matrix instruction i.
  __device__ __forceinline__ void dequantize(int i, const float2&, const u8*, const Lane&, u32* a) const {
    const u32 upper = i == 0 ? low.x : i == 1 ? low.y : i == 2 ? low.z : low.w;
    const u32 lower = i == 0 ? high.x : i == 1 ? high.y : i == 2 ? high.z : high.w;
    a[0] = Format::pair<0x4140>(upper), a[1] = Format::pair<0x4140>(lower);
    a[2] = Format::pair<0x4342>(upper), a[3] = Format::pair<0x4342>(lower);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) int8_gemm(Problem problem, Format format) { gemm<Operand>(problem, format); }
