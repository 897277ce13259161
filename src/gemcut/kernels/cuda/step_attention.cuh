// The attention of the decode step: one new token over the paged cache, as in decode_attention.cu but by all warps of the
// blocks of one running launch, from words (words.cuh) to words.
//
// A block owns one key head and a run of its cached tokens. Every group of LANES lanes keeps a running softmax of its own;
// these are joined in the warp, then in the block. Where a head has several runs, each of its blocks then joins them for its
// share of the head's columns. The order is always the same. The new token begins the last run, from registers.

struct Attention {
  const u32* qkv;        // words [(GROUP + 2) * kv_heads * HEAD_DIM]: queries, keys, values
  u32* out;              // words [GROUP * kv_heads * HEAD_DIM]
  u64* partial;          // packets [kv_heads, most runs, GROUP, STATE]
  u16* keys;             // this layer's: [blocks, block size, kv_heads, HEAD_DIM]
  u16* values;
  const int* table;      // the cache block of each run of block-size tokens
  const float* norms;    // [2, HEAD_DIM]: of queries and of keys, or null
  float scale, softcap, eps;   // softcap 0: none
  int kv_heads, block_shift, position;
  u32 tag;
};

constexpr int WARPS = BLOCK_WARPS;
constexpr int LANES = HEAD_DIM / 8, TOKENS = 32 / LANES, LOADS = GROUP > 2 ? 2 : 4, UNIT = TOKENS * LOADS, STATE = HEAD_DIM + 2;
constexpr int UNITS_A_WARP = 1;   // at least, before a head's tokens are split over blocks

// What a block reads of the cache: the same in all layers that attend to the whole context, and in all that slide. It is laid
// out once, so that a layer's first reads wait for nothing.
struct Run {
  int index, count;                  // which of its head's runs, if it is less than their count
  int first, origin, unit, unit_end;   // the first token attended to; where units are counted from; the block's units
  int first_block;                   // of those that `blocks` has
  int new_block;                     // the new token's
  __align__(16) float rope[HEAD_DIM];   // the position's cosines, then its sines
  int blocks[WARPS * UNIT + 1];      // cache blocks of each warp's first unit
};

// window 0: the whole context. All threads of the block call it.
__device__ __forceinline__ void plan_run(Run& run, int position, int window, int kv_heads, int block_shift, const int* table,
                                         const float* rope) {
  const int most = gridDim.x / kv_heads, index = blockIdx.x / kv_heads;
  const int first = window > 0 ? max(0, position - window + 1) : 0;
  const int origin = first / UNIT * UNIT;
  const int units = (position - origin + UNIT - 1) / UNIT;
  const int each = max((units + most - 1) / most, WARPS * UNITS_A_WARP);
  const int begin = index * each, end = min(units, begin + each);
  const int first_block = max(origin + begin * UNIT, first) >> block_shift;
  if (threadIdx.x == 0) {
    run.index = index, run.count = max(1, (units + each - 1) / each);
    run.first = first, run.origin = origin, run.unit = begin, run.unit_end = end, run.first_block = first_block;
    run.new_block = table[position >> block_shift];
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < WARPS * UNIT + 1; i += WARPS * 32) {
    if (first_block + i <= position >> block_shift) run.blocks[i] = table[first_block + i];
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < HEAD_DIM; i += WARPS * 32) run.rope[i] = rope[i];
}

// softcap * tanh(score / softcap), from 2 / softcap.
__device__ __forceinline__ float capped(float score, float softcap, float factor) {
  return softcap > 0.f ? softcap - __fdividef(2.f * softcap, 1.f + __expf(score * factor)) : score;
}
__device__ __forceinline__ float weight_of(float score, float top) { return score == MINUS_INFINITY ? 0.f : __expf(score - top); }

// Eight values of a head in shared memory, normalised where `weight` is given and rotated; LANES lanes have the whole head.
__device__ __forceinline__ void rotated8(const float* head, const float* weight, float eps, const float* rope, int part, float (&to)[8]) {
  const int partner = part ^ LANES / 2, pair = part % (LANES / 2);
  float own[8], other[8], cosine[8], sine[8];
  load8(head + part * 8, own), load8(head + partner * 8, other);
  load8(rope + pair * 8, cosine), load8(rope + HEAD_DIM / 2 + pair * 8, sine);
  if (weight != nullptr) {
    float squares = 0.f, w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += own[i] * own[i];
    const float scale = rsqrtf(sum_lanes<LANES>(squares) / HEAD_DIM + eps);
    load8(weight + part * 8, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) own[i] *= scale * w[i];
    load8(weight + partner * 8, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) other[i] *= scale * w[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = own[i] * cosine[i] + (part < LANES / 2 ? -other[i] : other[i]) * sine[i];
}

// All threads of the block call it; `states` has room for [WARPS][GROUP][STATE] floats and the new token's heads.
__device__ __forceinline__ void attend(const Attention& p, const Run& run, float* states) {
  const int thread = this_thread();
  const int kv = blockIdx.x % p.kv_heads, most_runs = gridDim.x / p.kv_heads, runs = run.count;
  const int warp = thread / 32, lane = thread % 32, part = lane % LANES, sub = lane / LANES;
  if (run.index >= runs) return;
  const int first = run.first, origin = run.origin, unit_end = run.unit_end;
  const size_t token_stride = (size_t)p.kv_heads * HEAD_DIM, lane_at = (size_t)kv * HEAD_DIM + part * 8;
  const int block_mask = (1 << p.block_shift) - 1;
  const float cap_factor = 2.f / p.softcap;

  // Keys of the next unit are fetched as soon as scores are known, values as soon as they are added up; their places a unit
  // earlier still. All of it but the new token was written by earlier launches, so the first unit is fetched before the wait.
  uint4 k[LOADS] = {}, v[LOADS] = {};   // zero: a register that is set in one branch only would be kept from the kernel's start
  u32 places[LOADS] = {};
  auto token_of = [&](int unit, int j) { return min(max(origin + unit * UNIT + j * TOKENS + sub, first), p.position - 1); };   // a real one
  auto place = [&](int block, int token) { return ((u32)block << p.block_shift) + (token & block_mask); };
  auto find = [&](int unit) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) places[j] = place(p.table[token_of(unit, j) >> p.block_shift], token_of(unit, j));
  };
  auto fetch = [&](const u16* from, uint4 (&to)[LOADS]) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) to[j] = __ldcg(reinterpret_cast<const uint4*>(from + places[j] * token_stride + lane_at));
  };
  int unit = run.unit + warp;
  if (unit < unit_end) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      const int token = token_of(unit, j);
      places[j] = place(run.blocks[(token >> p.block_shift) - run.first_block], token);
    }
    fetch(p.keys, k), fetch(p.values, v);
  }
  if (unit + WARPS < unit_end) find(unit + WARPS);

  float* const fresh = states + WARPS * GROUP * STATE;   // the new token: queries, key, value, each [HEAD_DIM]
  constexpr int NEW = (GROUP + 2) * HEAD_DIM / 4;
#pragma unroll 1
  for (int i = thread; i < (NEW + 31) / 32 * 32; i += WARPS * 32) {   // whole warps; the last lanes may repeat the last values
    const int four = min(i, NEW - 1), head = four * 4 / HEAD_DIM, row = head < GROUP ? kv * GROUP + head : head * p.kv_heads + kv;
    auto at = [&](int) { return p.qkv + row * HEAD_DIM + four * 4 % HEAD_DIM; };
    uint4 words[1] = {load_words(at(0))};
    await_words(words, p.tag, 1, at);
    reinterpret_cast<float4*>(fresh)[four] =
        make_float4(word_value(words[0].x), word_value(words[0].y), word_value(words[0].z), word_value(words[0].w));
  }
  __syncthreads();
  __syncwarp();   // see block_sums in step.cu
  float query[GROUP][8], sum[GROUP][8] = {}, top[GROUP], total[GROUP] = {};
#pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    rotated8(fresh + g * HEAD_DIM, p.norms, p.eps, run.rope, part, query[g]);
#pragma unroll
    for (int i = 0; i < 8; ++i) query[g][i] *= p.scale;
    top[g] = MINUS_INFINITY;
  }
  if (run.index == runs - 1 && warp == 0) {   // the new token
    float key[8], value[8];
    rotated8(fresh + GROUP * HEAD_DIM, p.norms != nullptr ? p.norms + HEAD_DIM : nullptr, p.eps, run.rope, part, key);
    load8(fresh + (GROUP + 1) * HEAD_DIM + part * 8, value);
    const uint4 packed_key = pack8(key), packed_value = pack8(value);
    unpack8(packed_key, key), unpack8(packed_value, value);
    if (sub == 0) {
      const size_t to = place(run.new_block, p.position) * token_stride + lane_at;
      *reinterpret_cast<uint4*>(p.keys + to) = packed_key;
      *reinterpret_cast<uint4*>(p.values + to) = packed_value;
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) score += query[g][i] * key[i];
      score = sum_lanes<LANES>(score);
      if (sub == 0) {
        top[g] = capped(score, p.softcap, cap_factor), total[g] = 1.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[g][i] = value[i];
      }
    }
  }

#pragma unroll 1
  while (unit < unit_end) {
    __syncwarp();
    const int token0 = origin + unit * UNIT + sub;
    float score[GROUP][LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      float key[8];
      unpack8(k[j], key);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        score[g][j] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) score[g][j] += query[g][i] * key[i];
      }
    }
    const bool more = unit + WARPS < unit_end;
    if (more) fetch(p.keys, k);
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float best = top[g];
#pragma unroll
      for (int j = 0; j < LOADS; ++j) {
        const int token = token0 + j * TOKENS;
        const float s = capped(sum_lanes<LANES>(score[g][j]), p.softcap, cap_factor);
        score[g][j] = token >= first && token < p.position ? s : MINUS_INFINITY;
        best = fmaxf(best, score[g][j]);
      }
      const float keep = weight_of(top[g], best);
      top[g] = best, total[g] *= keep;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] *= keep;
#pragma unroll
      for (int j = 0; j < LOADS; ++j) {
        score[g][j] = weight_of(score[g][j], best);
        total[g] += score[g][j];
      }
    }
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      float value[8];
      unpack8(v[j], value);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[g][i] += score[g][j] * value[i];
      }
    }
    if (more) fetch(p.values, v);
    unit += WARPS;
    if (unit + WARPS < unit_end) find(unit + WARPS);
  }

  __syncwarp();
#pragma unroll
  for (int g = 0; g < GROUP; ++g) {   // join the warp's groups of lanes
#pragma unroll
    for (int lanes = LANES; lanes < 32; lanes *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, top[g], lanes), best = fmaxf(top[g], other);
      const float mine = weight_of(top[g], best), theirs = weight_of(other, best);
      top[g] = best;
      total[g] = total[g] * mine + __shfl_xor_sync(0xffffffffu, total[g], lanes) * theirs;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] = sum[g][i] * mine + __shfl_xor_sync(0xffffffffu, sum[g][i], lanes) * theirs;
    }
    if (sub == 0) {
      float* const to = states + (warp * GROUP + g) * STATE;
#pragma unroll
      for (int i = 0; i < 8; ++i) to[part * 8 + i] = sum[g][i];
      if (part == 0) to[HEAD_DIM] = top[g], to[HEAD_DIM + 1] = total[g];
    }
  }
  __syncthreads();

  const int late = this_thread();
  u32* const out = p.out + kv * GROUP * HEAD_DIM;
  u64* const partial = p.partial + (size_t)kv * most_runs * GROUP * STATE;
#pragma unroll 1
  for (int i = late; i < GROUP * HEAD_DIM; i += WARPS * 32) {   // join the block's warps
    const int g = i / HEAD_DIM, d = i % HEAD_DIM;
    float best = MINUS_INFINITY, value = 0.f, weights = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) best = fmaxf(best, states[(w * GROUP + g) * STATE + HEAD_DIM]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float* const state = states + (w * GROUP + g) * STATE;
      const float weight = weight_of(state[HEAD_DIM], best);
      value += weight * state[d], weights += weight * state[HEAD_DIM + 1];
    }
    if (runs == 1) {
      publish(out + i, value / weights, p.tag);
    } else {
      u64* const to = partial + (run.index * GROUP + g) * STATE;
      publish_packet(to + d, value, p.tag);
      if (d == 0) publish_packet(to + HEAD_DIM, best, p.tag), publish_packet(to + HEAD_DIM + 1, weights, p.tag);
    }
  }
  if (runs > 1) {   // join the head's runs
    const int end = (run.index + 1) * GROUP * HEAD_DIM / runs;
#pragma unroll 1
    for (int i = run.index * GROUP * HEAD_DIM / runs + late; i < end; i += WARPS * 32) {
      const int g = i / HEAD_DIM, d = i % HEAD_DIM;
      float best = MINUS_INFINITY, value = 0.f, weights = 0.f;
      constexpr int AHEAD = 4;
#pragma unroll 1
      for (int r0 = 0; r0 < runs; r0 += AHEAD) {
        u64 packets[3 * AHEAD] = {};   // of each run: the value, its largest score, its weights
        auto at = [&](int i) {
          const u64* const state = partial + ((r0 + i / 3) * GROUP + g) * STATE;
          return i % 3 == 0 ? state + d : state + HEAD_DIM + i % 3 - 1;
        };
        const u32 wanted = (1u << 3 * min(AHEAD, runs - r0)) - 1;
#pragma unroll
        for (int j = 0; j < 3 * AHEAD; ++j) {
          if (wanted >> j & 1) packets[j] = load_packet(at(j));
        }
        await_packets(packets, p.tag, wanted, at);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
          if (r0 + j >= runs) break;
          const float score = packet_value(packets[3 * j + 1]), higher = fmaxf(best, score);
          const float keep = weight_of(best, higher), weight = weight_of(score, higher);
          best = higher;
          value = value * keep + weight * packet_value(packets[3 * j]);
          weights = weights * keep + weight * packet_value(packets[3 * j + 2]);
        }
      }
      publish(out + i, value / weights, p.tag);
    }
  }
}
