// Computes: a warp's online softmax over keys and values that it reads from the cache, for one new token a sequence
// Shapes: queries fp32 [GROUP, HEAD_DIM]; keys and values bf16 rows [HEAD_DIM]; sums fp32 [GROUP, HEAD_DIM] a warp
// Runs: attention/decode.cu and megakernel/attention.cuh, one warp for a unit of TOKENS * LOADS tokens at a time
// Schedule: flash-decoding's inner loop: online softmax (arXiv 1805.02867), grouped-query heads side by side
// Invariants: the order of every sum is fixed; tokens outside [first, last] weigh nothing; nor does an idle warp
//
// LANES lanes hold a row of a head between them (8 values, 16 bytes each), so a warp reads TOKENS tokens at a time. LOADS such
// groups of keys and of values are its unit. Each warp keeps one running softmax for each of the GROUP query heads that share the
// key head.
//
// Compiled after launch.cuh and rope.cuh.

constexpr int LANES = HEAD_DIM / 8, TOKENS = 32 / LANES, UNIT = TOKENS * LOADS;

// softcap * tanh(score / softcap), given 2 / softcap; softcap 0: none.
__device__ __forceinline__ float capped(float score, float softcap, float factor) {
  return softcap > 0.f ? softcap - __fdividef(2.f * softcap, 1.f + __expf(score * factor)) : score;
}
__device__ __forceinline__ float weight_of(float score, float top) { return score == MINUS_INFINITY ? 0.f : __expf(score - top); }

// Butterfly reduce-scatter: sums each of `v` over the lanes that differ in the bits FROM, FROM / 2, … TO of their number, and
// scatters the sums. At each bit a lane keeps half of its values (the upper half where the bit is set) and sends the other half to
// its partner, one shuffle a value. Once a lane has one value left, both partners keep it (an all-reduce).
template <int FROM, int TO, int COUNT>
__device__ __forceinline__ void reduce_scatter(float (&v)[COUNT], int lane) {
  int count = COUNT;
#pragma unroll
  for (int bit = FROM; bit >= TO; bit /= 2) {
    if (count == 1) {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
      continue;
    }
    count /= 2;
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      if (i >= count) break;
      const float other = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + count], bit);
      v[i] = (upper ? v[i + count] : v[i]) + other;
    }
  }
}

// A warp's online softmax. A unit has SCORES scores, query head by query head. A lane computes HELD of them (of HEADS query heads).
// Where there are fewer scores than lanes, SPREAD neighbouring lanes compute the same ones.
struct Softmax {
  static constexpr int SCORES = GROUP * LOADS;
  static constexpr int HOLDERS = SCORES < LANES ? SCORES : LANES, HELD = SCORES / HOLDERS;
  static constexpr int HEADS = GROUP > HOLDERS ? GROUP / HOLDERS : 1;   // that one lane holds scores of
  static constexpr int SPREAD = LANES / HOLDERS;                        // lanes with the same scores
  static constexpr int PER_HEAD = GROUP > HOLDERS ? 1 : HOLDERS / GROUP;   // holders of a query head's scores
  static constexpr int VALUES = GROUP * 8, KEEPERS = VALUES < TOKENS ? VALUES : TOKENS, KEPT = VALUES / KEEPERS;

  float sum[GROUP][8] = {};          // values, weighted: of this lane's columns and tokens
  float top[HEADS], total[HEADS] = {};   // the running maximum of the scores; the sum of the weights that this lane computed

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) top[h] = MINUS_INFINITY;
  }

  // This lane's partial sums of the scores: its 8 columns of each of the unit's keys.
  __device__ __forceinline__ static void multiply(const float (&query)[GROUP][8], const uint4 (&keys)[LOADS], float (&score)[SCORES]) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      float key[8];
      unpack8(keys[j], key);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        float product = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) product += query[g][i] * key[i];
        score[g * LOADS + j] = product;
      }
    }
  }

  // From partial sums of scores to weights: of key j and query head g at g * LOADS + j. `token0` is the token of this lane's first key;
  // those outside [first, last] weigh nothing.
  __device__ __forceinline__ void weigh(float (&score)[SCORES], int token0, int first, int last, float softcap, float factor, int lane) {
    reduce_scatter<LANES / 2, 1>(score, lane);
    const int holder = lane % LANES / SPREAD;
    float best[HEADS], keep[HEADS], weight[HELD];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) best[h] = top[h];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int token = token0 + (holder * HELD + i) % LOADS * TOKENS;
      weight[i] = token >= first && token <= last ? capped(score[i], softcap, factor) : MINUS_INFINITY;
      best[i / (HELD / HEADS)] = fmaxf(best[i / (HELD / HEADS)], weight[i]);
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
      for (int bit = SPREAD; bit < SPREAD * PER_HEAD; bit *= 2) best[h] = fmaxf(best[h], __shfl_xor_sync(0xffffffffu, best[h], bit));
#pragma unroll
      for (int bit = LANES; bit < 32; bit *= 2) best[h] = fmaxf(best[h], __shfl_xor_sync(0xffffffffu, best[h], bit));
      keep[h] = weight_of(top[h], best[h]);
      top[h] = best[h], total[h] *= keep[h];
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      weight[i] = weight_of(weight[i], best[i / (HELD / HEADS)]);
      total[i / (HELD / HEADS)] += weight[i];
    }
    const int row = lane & ~(LANES - 1);   // the first lane of this lane's token
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      const float kept = __shfl_sync(0xffffffffu, keep[g % HEADS], row + g / HEADS * PER_HEAD * SPREAD);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] *= kept;
    }
#pragma unroll
    for (int i = 0; i < SCORES; ++i) score[i] = __shfl_sync(0xffffffffu, weight[i % HELD], row + i / HELD * SPREAD);
  }

  __device__ __forceinline__ void add(const float (&weight)[SCORES], const uint4 (&values)[LOADS]) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      float value[8];
      unpack8(values[j], value);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[g][i] += weight[g * LOADS + j] * value[i];
      }
    }
  }

  // The warp's sums to `values` [GROUP, HEAD_DIM] in shared memory, its largest scores and sums of weights to tops and totals,
  // of query head g at g * stride.
  __device__ __forceinline__ void store(float* values, float* tops, float* totals, int stride, int lane) {
    const int part = lane % LANES, sub = lane / LANES;
    float flat[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) flat[i] = sum[i / 8][i % 8];
    reduce_scatter<16, LANES>(flat, lane);
    if (sub % (TOKENS / KEEPERS) == 0) {
      const int first = sub / (TOKENS / KEEPERS) * KEPT;
      if constexpr (KEPT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i += 4) {
          float* const to = values + (first + i) / 8 * HEAD_DIM + part * 8 + (first + i) % 8;
          *reinterpret_cast<float4*>(to) = make_float4(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) values[(first + i) / 8 * HEAD_DIM + part * 8 + (first + i) % 8] = flat[i];
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
      for (int bit = SPREAD; bit < SPREAD * PER_HEAD; bit *= 2) total[h] += __shfl_xor_sync(0xffffffffu, total[h], bit);
#pragma unroll
      for (int bit = LANES; bit < 32; bit *= 2) total[h] += __shfl_xor_sync(0xffffffffu, total[h], bit);
      const int g = part / SPREAD / PER_HEAD * HEADS + h;
      if (sub == 0 && part % (SPREAD * PER_HEAD) == 0) tops[g * stride] = top[h], totals[g * stride] = total[h];
    }
  }
};

// Combines the stored softmaxes of WARP_COUNT warps: four neighbouring columns d of query head g. `score` is the largest score,
// `weights` the sum of weights relative to it, as the values are. WARP_COUNT is a multiple of four, `tops` and `totals` stand at such ones.
template <int WARP_COUNT>
__device__ __forceinline__ float4 combine_warps(const float* values, const float* tops, const float* totals, int g, int d, float& score,
                                               float& weights) {
  float top[WARP_COUNT], total[WARP_COUNT];
#pragma unroll
  for (int w = 0; w < WARP_COUNT; w += 4) {
    const float4 a = *reinterpret_cast<const float4*>(tops + g * WARP_COUNT + w), b = *reinterpret_cast<const float4*>(totals + g * WARP_COUNT + w);
    top[w] = a.x, top[w + 1] = a.y, top[w + 2] = a.z, top[w + 3] = a.w;
    total[w] = b.x, total[w + 1] = b.y, total[w + 2] = b.z, total[w + 3] = b.w;
  }
  score = top[0];
#pragma unroll
  for (int w = 1; w < WARP_COUNT; ++w) score = fmaxf(score, top[w]);
  float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
  weights = 0.f;
#pragma unroll
  for (int w = 0; w < WARP_COUNT; ++w) {
    const float weight = __expf(top[w] - score);   // some warp has a token, so `score` is a number
    const float4 v = *reinterpret_cast<const float4*>(values + (w * GROUP + g) * HEAD_DIM + d);
    value.x += weight * v.x, value.y += weight * v.y, value.z += weight * v.z, value.w += weight * v.w;
    weights += weight * total[w];
  }
  return value;
}
