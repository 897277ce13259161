// Computes: y = x W^T of NF4 or FP4 weights for 9 to 896 rows: W as wgmma's register operand in gemm.cuh
// Shapes: x bf16 in the layout of layout.cuh; codes and scales as in four_bit_gemv.cu; y bf16 [m, n]
// Runs: linear/gemm.py on Hopper; linear/routes.py says for how many rows
// Schedule: that of gemm.cuh; dequantizing by codebook look-up overlaps with wgmma (as in Marlin, arXiv 2408.11743)
// Invariants: up to 64 rows block sums are scaled in fp32; from 96 on each weight is scaled and rounded to bf16 once
//
// Scaling a block's sums costs an operation for each sum and block. From 96 rows on it is cheaper to scale each weight: its
// code, in fp16 (which holds it four bits closer than bf16), times the scale in fp32, rounded to bf16 once. Compiled after
// four_bit_gemv.cu and gemm.cuh.

struct Operand {
  static constexpr bool SCALED_AFTER = ROWS <= 64;
  uint4 q;

  __device__ __forceinline__ Operand(const u8* stage, const Lane& lane, int b) {
    q = *reinterpret_cast<const uint4*>(stage + b * 512 + lane.id * 16);
  }

  __device__ __forceinline__ static void fill_codebook(const Format& format, u8* codebook, int threads) {
    Format chosen = format;
    if (!SCALED_AFTER) chosen.pairs += 256;   // the same in fp16
    chosen.fill_codebook(codebook, threads);
  }

  __device__ __forceinline__ static float2 scales(const Format& format, const u8* stage, const Lane& lane, const Format::Scale& group,
                                                  const u8* codebook) {
    Format::Fragment f;
#if NESTED
    f.scales.x = __uint_as_float(*reinterpret_cast<const u16*>(stage + Format::CODE_BYTES + lane.id * 2));
#else
    f.scales = *reinterpret_cast<const float2*>(stage + Format::CODE_BYTES + lane.id * 8);
#endif
    return format.expand(f, group, codebook);
  }

  __device__ __forceinline__ static float2 of_block(const float2& scales, const Lane& lane, int b) {
    const int from = (lane.id & 28) + b;
    return make_float2(__shfl_sync(0xffffffffu, scales.x, from), __shfl_sync(0xffffffffu, scales.y, from));
  }

  template <int BYTE>
  __device__ __forceinline__ static u32 pair(const u8* codebook, u32 lane4, u32 word, float scale) {
    const u32 codes = Format::pair<BYTE>(codebook, lane4, word);
    if (SCALED_AFTER) return codes;
    float low, high;
    asm("{.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(codes));
    return pack_bf16(low * scale, high * scale);
  }

  // The operand of matrix instruction i.
  __device__ __forceinline__ void dequantize(int i, const float2& scale, const u8* codebook, const Lane& lane, u32* a) const {
    const u32 low = i < 2 ? q.x : q.y, high = i < 2 ? q.z : q.w, lane4 = lane.id * 4;
    if (i % 2 == 0) {
      a[0] = pair<0>(codebook, lane4, low, scale.x), a[1] = pair<0>(codebook, lane4, high, scale.y);
      a[2] = pair<1>(codebook, lane4, low, scale.x), a[3] = pair<1>(codebook, lane4, high, scale.y);
    } else {
      a[0] = pair<2>(codebook, lane4, low, scale.x), a[1] = pair<2>(codebook, lane4, high, scale.y);
      a[2] = pair<3>(codebook, lane4, low, scale.x), a[3] = pair<3>(codebook, lane4, high, scale.y);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) four_bit_gemm(Problem problem, Format format) { gemm<Operand>(problem, format); }
