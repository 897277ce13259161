// Computes: y = x W^T of NF4 or FP4 weights for 9 to 1,792 rows: W as wgmma's register operand in gemm.cuh
// Shapes: x bf16 in the layout of layout.cuh; codes and scales as in four_bit_gemv.cu; y bf16 [m, n]
// Runs: linear/gemm.py on Hopper; linear/routes.py says for how many rows
// Schedule: that of gemm.cuh; dequantizing by codebook look-up overlaps with wgmma (as in Marlin, arXiv 2408.11743)
// Invariants: up to 64 rows block sums are scaled in fp32; from 96 on each weight is scaled and rounded to bf16 once
//
// Scaling a block's sums costs an operation for each sum and block. From 96 rows on it is cheaper to scale each weight: its
// code, in fp16 (which holds it four bits closer than bf16), times the scale in fp32, rounded to bf16 once. Compiled after
// four_bit_gemv.cu and gemm.cuh.

struct Operand {
  static constexpr bool SCALED_AFTER = ROWS <= 64, PRODUCED = ROWS <= 64;
  static constexpr int CODE_BYTES = Format::CODE_BYTES;
  static constexpr int STAGE_BYTES = PRODUCED ? CODE_BYTES + TILE * 4 * 4 : Format::STAGE_BYTES;   // producers' scales are in fp32
  uint4 q;

  __device__ __forceinline__ Operand(const u8* stage, const Lane& lane, int b) {
    q = *reinterpret_cast<const uint4*>(stage + b * 512 + lane.id * 16);
  }

  __device__ __forceinline__ static void fill_codebook(const Format& format, u8* codebook, int threads) {
    Format chosen = format;
    if (!SCALED_AFTER) chosen.pairs += 256;   // the same in fp16
    chosen.fill_codebook(codebook, threads);
  }

  // Scales of rows group and group + 8 in the lane's block of a warp's own stage; from there, in block b.
  __device__ __forceinline__ static float2 scales(const Format& format, const u8* stage, const Lane& lane, const Format::Scale& group,
                                                  const u8* codebook) {
    Format::Fragment f;
#if NESTED
    f.scales.x = __uint_as_float(*reinterpret_cast<const u16*>(stage + CODE_BYTES + lane.id * 2));
#else
    f.scales = *reinterpret_cast<const float2*>(stage + CODE_BYTES + lane.id * 8);
#endif
    return format.expand(f, group, codebook);
  }
  __device__ __forceinline__ static float2 of_block(const float2& scales, const Lane& lane, int b) {
    const int from = (lane.id & 28) + b;
    return make_float2(__shfl_sync(0xffffffffu, scales.x, from), __shfl_sync(0xffffffffu, scales.y, from));
  }

  // The same from a producer's stage: of a warp's tile in block b.
  __device__ __forceinline__ static float2 of_block(const u8* stage, int tile, const Lane& lane, int b) {
    return reinterpret_cast<const float2*>(stage + 4 * CODE_BYTES)[(b * 4 + tile) * 8 + lane.group];
  }

  // What a producer's lane has of four blocks of a tile: the scales of rows lane.id % 8 and eight below.
  struct Scales {
#if NESTED
    uint2 bytes, later;       // block by block, both rows; later: of the four blocks behind
    float low[2], high[2];    // the scales of the rows' first and last block's scales: four blocks belong to two at most
    float offset;
    int low_left, high_left;  // blocks to the end of the first one's 256 scales
#else
    float4 low, high, low_later, high_later;
#endif
    // Loads those of a place, into `later`; what was loaded so before moves up.
    __device__ __forceinline__ void prefetch(const Format& format, const Lane& lane, int tile, int k_block) {
      const u8* const from = format.scales + (size_t)((u32)tile * format.k_blocks + k_block) * Format::SCALE_BYTES;
#if NESTED
      bytes = later;
      asm volatile("ld.global.nc.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(later.x), "=r"(later.y) : "l"(from + lane.id % 8 * 8));
#else
      low = low_later, high = high_later;
      low_later = __ldg(reinterpret_cast<const float4*>(from) + lane.id % 8 * 2);
      high_later = __ldg(reinterpret_cast<const float4*>(from) + lane.id % 8 * 2 + 1);
#endif
    }
    // The scales of `bytes`, of this place.
    __device__ __forceinline__ void read_groups(const Format& format, const Lane& lane, int tile, int k_block) {
#if NESTED
      const int row = tile * TILE + lane.id % 8;
      const int low_at = min(row, format.n - 1) * format.blocks + k_block * 4, high_at = min(row + 8, format.n - 1) * format.blocks + k_block * 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        low[i] = __ldg(format.groups + min((low_at + 3 * i) >> 8, format.group_last));
        high[i] = __ldg(format.groups + min((high_at + 3 * i) >> 8, format.group_last));
      }
      low_left = 256 - (low_at & 255), high_left = 256 - (high_at & 255);
      offset = tile < format.part_tiles[0] ? format.offsets[0] : tile < format.part_tiles[1] ? format.offsets[1] : format.offsets[2];
#endif
    }
    // Of both rows, block by block, in fp32.
    __device__ __forceinline__ void expand(const u8* codebook, float2 (&to)[4]) const {
#if NESTED
      const float* const map = reinterpret_cast<const float*>(codebook + Format::PAIR_BYTES);
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const u32 both = b < 2 ? bytes.x >> 16 * b : bytes.y >> 16 * (b - 2);
        to[b] = make_float2(map[both & 255], map[both >> 8 & 255]);
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        to[b].x = to[b].x * (b < low_left ? low[0] : low[1]) + offset, to[b].y = to[b].y * (b < high_left ? high[0] : high[1]) + offset;
      }
#else
      to[0] = make_float2(low.x, low.y), to[1] = make_float2(low.z, low.w);
      to[2] = make_float2(high.x, high.y), to[3] = make_float2(high.z, high.w);
#endif
    }
  };

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
