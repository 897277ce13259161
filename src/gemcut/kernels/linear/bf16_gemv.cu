// Computes: y = x W^T for a few rows of x and bf16 weights as stored; the same bytes serve as an embedding table
// Shapes: x bf16 [m, k], m from 1 to 8; W bf16 [n, k] row-major; y bf16 [m, n], or fp32 logits [m, n]
// Runs: linear/bf16.py through linear/gemv.py; also a weight format of the megakernel
// Schedule: that of gemv.cuh: persistent GEMV, split-K with a Stream-K fix-up
// Invariants: rows of W begin at multiples of 16 bytes; nothing is dequantized; sums in fp32

struct Format : RowMajor<Format> {
  static constexpr int K_BLOCK = 64;
  static constexpr int X_LANE = 16, X_PAD = 64;

  const u8* weight;          // [n, k]
  int n, k;

  __device__ __forceinline__ long long row_bytes() const { return 2LL * k; }

  __device__ __forceinline__ void multiply(const Fragment& f, const Scale&, const u8*, const u8* x, bool has_x, const Lane&,
                                           float (&sum)[4]) const {
#pragma unroll
    for (int b = 0; b < K_BLOCK / 32; ++b) {
      const uint4 low = f.low[b], high = f.high[b];
      uint4 xv = make_uint4(0, 0, 0, 0);
      fetch_x(xv, x + b * 64, has_x);
      mma_m16n8k16(sum, low.x, high.x, low.y, high.y, xv.x, xv.y);
      mma_m16n8k16(sum, low.z, high.z, low.w, high.w, xv.z, xv.w);
    }
  }

  __device__ __forceinline__ float row_scale(int) const { return 1.f; }

  __device__ __forceinline__ float epilogue(int, float value) const { return value; }
};

#if defined(FIXED_K_BLOCKS) && FIXED_K_BLOCKS == 0
extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCK_RESIDENT)
bf16_gemv(Problem problem, Format format) { gemv<Format, BLOCK_WARPS, BLOCK_STAGES>(problem, format); }
#endif
