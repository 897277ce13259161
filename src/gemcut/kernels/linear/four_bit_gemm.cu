// Four-bit weights as the register side of gemm.cuh. Compiled after four_bit_gemv.cu and gemm.cuh.
//
// For few rows of x codes are multiplied unscaled and each block of 64 columns is scaled in fp32, as in four_bit_gemv.cu. That
// costs an operation for each sum and block; from 96 rows on it is cheaper to scale each weight: its code, in fp16 (which
// holds it four bits closer than bf16), times the scale in fp32, rounded to bf16 once.

struct Operand {
  static constexpr bool SCALED_AFTER = ROWS <= 64;
  uint4 q;

  __device__ __forceinline__ Operand(const u8* stage, const Lane& lane, int b) {
    q = *reinterpret_cast<const uint4*>(stage + b * 512 + lane.id * 16);
  }

  __device__ __forceinline__ static void fill_tables(const Format& format, u8* tables, int threads) {
    Format chosen = format;
    if (!SCALED_AFTER) chosen.pairs += 256;   // the same in fp16
    chosen.fill_tables(tables, threads);
  }

  __device__ __forceinline__ static float2 scales(const Format& format, const u8* stage, const Lane& lane, const Format::Scale& group,
                                                  const u8* tables) {
    Format::Fragment f;
#if NESTED
    f.scales.x = __uint_as_float(*reinterpret_cast<const u16*>(stage + Format::CODE_BYTES + lane.id * 2));
#else
    f.scales = *reinterpret_cast<const float2*>(stage + Format::CODE_BYTES + lane.id * 8);
#endif
    return format.expand(f, group, tables);
  }

  __device__ __forceinline__ static float2 of_block(const float2& scales, const Lane& lane, int b) {
    const int from = (lane.id & 28) + b;
    return make_float2(__shfl_sync(0xffffffffu, scales.x, from), __shfl_sync(0xffffffffu, scales.y, from));
  }

  template <int BYTE>
  __device__ __forceinline__ static u32 pair(const u8* tables, u32 lane4, u32 word, float scale) {
    const u32 codes = Format::pair<BYTE>(tables, lane4, word);
    if (SCALED_AFTER) return codes;
    float low, high;
    asm("{.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(codes));
    return pack_bf16(low * scale, high * scale);
  }

  // The operand of matrix instruction i.
  __device__ __forceinline__ void decode(int i, const float2& scale, const u8* tables, const Lane& lane, u32* a) const {
    const u32 low = i < 2 ? q.x : q.y, high = i < 2 ? q.z : q.w, lane4 = lane.id * 4;
    if (i % 2 == 0) {
      a[0] = pair<0>(tables, lane4, low, scale.x), a[1] = pair<0>(tables, lane4, high, scale.y);
      a[2] = pair<1>(tables, lane4, low, scale.x), a[3] = pair<1>(tables, lane4, high, scale.y);
    } else {
      a[0] = pair<2>(tables, lane4, low, scale.x), a[1] = pair<2>(tables, lane4, high, scale.y);
      a[2] = pair<3>(tables, lane4, low, scale.x), a[3] = pair<3>(tables, lane4, high, scale.y);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) four_bit_gemm(Problem problem, Format format) { gemm<Operand>(problem, format); }
