// Computes: the megakernel's attention: one new token of one sequence over the paged cache
// Shapes: qkv, out: flagged words; cache bf16 [blocks, block size, kv_heads, HEAD_DIM]; lse a line per LSE_COLUMNS
// Runs: every block of decode_step.cu: plan_split() once a launch, attend() and gather_splits() once a layer
// Schedule: flash-decoding (Dao et al. 2023) in a persistent kernel; results are flagged words (NCCL's LL protocol)
// Invariants: splits are combined in a fixed order; every word of `out` is written in every layer
//
// A block owns one key head and a split of its tokens, the new one included. It combines its warps' softmaxes in shared memory. Up
// to FEW_SPLITS splits of a head stand side by side in `out`, and who reads them combines them by their log-sum-exp
// (gather_splits). More splits are combined by their own blocks first, each for an equal part of the head's columns
// (combine_splits).
//
// Compiled after attention/attention.cuh and flags.cuh.

struct Attention {
  const u32* qkv;        // flagged words [(GROUP + 2) * kv_heads * HEAD_DIM]: queries, keys, values
  u32* out;              // flagged words [FEW_SPLITS, GROUP * kv_heads * HEAD_DIM]
  u32* lse;              // flagged words [GROUP * kv_heads * HEAD_DIM / LSE_COLUMNS, 32]: the first FEW_SPLITS are the splits' log-sum-exp
  u64* partial;          // packets (LL): values [kv_heads, most splits, GROUP, HEAD_DIM], then log-sum-exp [kv_heads, most splits, GROUP]
  u16* keys;             // this layer's: [blocks, block size, kv_heads, HEAD_DIM]
  u16* values;
  const int* table;      // the block table: a cache block for each block-size tokens
  const float* norms;    // [2, HEAD_DIM]: of queries and of keys, or null
  float scale, softcap, eps;   // softcap 0: none
  int kv_heads, block_shift, position;
  u32 tag;
};

constexpr int WARPS = BLOCK_WARPS;
static_assert(FEW_SPLITS == 4, "the log-sum-exp of the splits that stand side by side are one uint4 of words");
// So many columns have a line of memory for the log-sum-exp of their splits. All blocks read it: one line for all heads would
// serve some thousand warps one by one.
constexpr int LSE_COLUMNS = HEAD_DIM < 128 ? HEAD_DIM : 128;
constexpr int FEW_UNITS = 2;      // a warp's, before a head's tokens are split further
constexpr int UNITS_AHEAD = 2;    // prefetched into L2 beyond the next one

// What a block reads of the cache: the same in all layers that attend to the whole context, and in all with a window. It is
// computed once a launch, so that a layer's first reads wait for nothing.
struct Split {
  int index, count;                  // which of its head's splits, if it is less than their count
  int outputs;                       // of `out` that the reader combines
  int first, origin, unit, unit_end;   // the first token attended to; where units are counted from; the block's units
  u32 new_slot;                      // the new token's, in the cache
  __align__(16) float rope[HEAD_DIM];   // the position's cosines, then its sines
  u32 slots[WARPS * UNIT];           // of the tokens of each warp's first unit
};

// The attention's shared memory.
struct States {
  float values[WARPS * GROUP * HEAD_DIM];   // of each warp
  float query[GROUP * HEAD_DIM];            // the new token's, rotated and scaled
  u16 fresh[2 * HEAD_DIM];                  // its key and value
  __align__(16) float tops[GROUP * WARPS], totals[GROUP * WARPS];
  float4 splits[WARPS * 32];                // a column's value, largest log-sum-exp and weights over some splits
};

// window 0: the whole context. All threads of the block call it.
__device__ __forceinline__ void plan_split(Split& split, int position, int window, int kv_heads, int block_shift, const int* table,
                                         const float* rope) {
  const int most = gridDim.x / kv_heads, index = blockIdx.x / kv_heads, few = min(most, FEW_SPLITS);
  const int first = window > 0 ? max(0, position - window + 1) : 0;
  const int origin = first / UNIT * UNIT;
  const int units = (position - origin) / UNIT + 1;
  const int over = units <= few * WARPS * FEW_UNITS ? few : most;
  const int each = max((units + over - 1) / over, WARPS);
  const int begin = index * each, end = min(units, begin + each), count = (units + each - 1) / each;
  auto slot_of = [&](int token) { return ((u32)table[token >> block_shift] << block_shift) + (token & ((1 << block_shift) - 1)); };
  if (threadIdx.x == 0) {
    split.index = index, split.count = count, split.outputs = count <= FEW_SPLITS ? count : 1;
    split.first = first, split.origin = origin, split.unit = begin, split.unit_end = end, split.new_slot = slot_of(position);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < WARPS * UNIT; i += WARPS * 32) {
    split.slots[i] = slot_of(min(max(origin + begin * UNIT + i, first), position));   // of a real token
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < HEAD_DIM; i += WARPS * 32) split.rope[i] = rope[i];
}

// Prefetches into L2 a key or a value at one of a unit's slots: half a warp's lanes for each, one line a lane.
constexpr int LINES = HEAD_DIM > 64 ? HEAD_DIM / 64 : 1;   // of a row
__device__ __forceinline__ int prefetched_token(int lane) { return min(lane % 16 / LINES, UNIT - 1); }
__device__ __forceinline__ void prefetch_row(const u16* keys, const u16* values, u32 slot, int kv_heads, int lane) {
  const size_t at = ((size_t)slot * kv_heads + blockIdx.x % kv_heads) * HEAD_DIM + lane % LINES * 64;
  asm volatile("prefetch.global.L2 [%0];" ::"l"((lane < 16 ? keys : values) + at));
}

// Where LANES lanes find one of the new token's heads (queries, key, value; the last lanes may repeat the value). Each takes a
// uint4 of each half.
struct TokenHead {
  int head, column;
  const u32* from;
  __device__ __forceinline__ TokenHead(const Attention& p, int kv, int thread) {
    head = min(thread / LANES, GROUP + 1), column = thread % LANES * 4;
    from = p.qkv + (head < GROUP ? kv * GROUP + head : head * p.kv_heads + kv) * HEAD_DIM + column;
  }
  __device__ __forceinline__ const u32* operator()(int half) const { return from + half * (HEAD_DIM / 2); }
};

// Takes the new token, whose words are being loaded: normalises it where wanted, rotates it and stores it in shared memory. The
// last split's block writes the cache.
__device__ __forceinline__ void take_token(const Attention& p, const Split& split, States& s, int kv, const TokenHead& token_head, uint4 (&words)[2]) {
  const int head = token_head.head, column = token_head.column;
  float4 scales[2] = {};
  if (p.norms != nullptr) {
    const float* const norm = p.norms + (head == GROUP ? HEAD_DIM : 0) + column;
    scales[0] = read4(norm), scales[1] = read4(norm + HEAD_DIM / 2);
  }
  const float4 cosine = read4(split.rope + column), sine = read4(split.rope + HEAD_DIM / 2 + column);
  await_words(words, p.tag, 3, token_head);
  float4 low = value4(words[0]), high = value4(words[1]);
  if (p.norms != nullptr) {
    __syncwarp();
    const float scale = rsqrtf(sum_lanes<LANES>(dot4(low, low) + dot4(high, high)) / HEAD_DIM + p.eps);
    if (head <= GROUP) low = scaled4(multiply4(low, scales[0]), scale), high = scaled4(multiply4(high, scales[1]), scale);
  }
  if (head <= GROUP) {
    const float4 a = multiply4(low, cosine), b = multiply4(high, sine), c = multiply4(high, cosine), d = multiply4(low, sine);
    low = make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w), high = make_float4(c.x + d.x, c.y + d.y, c.z + d.z, c.w + d.w);
  }
  if (head < GROUP) {
    float* const to = s.query + head * HEAD_DIM + column;
    *reinterpret_cast<float4*>(to) = scaled4(low, p.scale), *reinterpret_cast<float4*>(to + HEAD_DIM / 2) = scaled4(high, p.scale);
    return;
  }
  auto put = [&](u16* to) {
    *reinterpret_cast<uint2*>(to + column) = pack4(low), *reinterpret_cast<uint2*>(to + HEAD_DIM / 2 + column) = pack4(high);
  };
  put(s.fresh + (head - GROUP) * HEAD_DIM);
  if (split.index == split.count - 1) {
    put((head == GROUP ? p.keys : p.values) + ((size_t)split.new_slot * p.kv_heads + kv) * HEAD_DIM);
  }
}

// Combines a head's splits, more than FEW_SPLITS, for this block's part of its columns. Several threads read a column's splits.
__device__ __forceinline__ void combine_splits(const Attention& p, const Split& split, States& s, const u64* values, const u64* lses, u32* out) {
  constexpr int AHEAD = 4;
  const int thread = this_thread(), begin = split.index * GROUP * HEAD_DIM / split.count;
  const int columns = (split.index + 1) * GROUP * HEAD_DIM / split.count - begin;
  const int width = (columns + 31) / 32 * 32, readers = min(WARPS * 32 / width, split.count), reader = thread / width;
  const int i = begin + min(thread % width, columns - 1), g = i / HEAD_DIM;
  if (reader < readers) {
    float best = MINUS_INFINITY, value = 0.f, weights = 0.f;
#pragma unroll 1
    for (int r0 = reader; r0 < split.count; r0 += readers * AHEAD) {
      u64 packets[2 * AHEAD] = {};
      auto at = [&](int j) {
        const int r = r0 + j / 2 * readers;
        return j % 2 == 0 ? values + (size_t)r * GROUP * HEAD_DIM + i : lses + r * GROUP + g;
      };
      u32 wanted = 0;
#pragma unroll
      for (int j = 0; j < 2 * AHEAD; ++j) {
        if (r0 + j / 2 * readers < split.count) packets[j] = load_packet(at(j)), wanted |= 1u << j;
      }
      await_packets(packets, p.tag, wanted, at);
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        const float score = wanted >> 2 * j & 1 ? packet_value(packets[2 * j + 1]) : MINUS_INFINITY, higher = fmaxf(best, score);
        const float keep = weight_of(best, higher), weight = weight_of(score, higher);
        best = higher, value = value * keep + weight * packet_value(packets[2 * j]), weights = weights * keep + weight;
      }
    }
    s.splits[thread] = make_float4(value, best, weights, 0.f);
  }
  __syncthreads();
  if (thread < columns) {
    float best = MINUS_INFINITY, value = 0.f, weights = 0.f;
#pragma unroll 4
    for (int j = 0; j < readers; ++j) best = fmaxf(best, s.splits[j * width + thread].y);
#pragma unroll 4
    for (int j = 0; j < readers; ++j) {
      const float4 part = s.splits[j * width + thread];
      const float weight = weight_of(part.y, best);
      value += weight * part.x, weights += weight * part.z;
    }
    publish(out + begin + thread, value / weights, p.tag);
  }
}

// All threads of the block call it.
__device__ __forceinline__ void attend(const Attention& p, const Split& split, States& s) {
  const int thread = this_thread();
  const int kv = blockIdx.x % p.kv_heads, most_splits = gridDim.x / p.kv_heads, splits = split.count;
  const int warp = thread / 32, lane = thread % 32, part = lane % LANES, sub = lane / LANES;
  const int heads_size = GROUP * p.kv_heads * HEAD_DIM;
  // Words of `out` that no split fills are written all the same: a word keeps its flag until it is written again, so one that
  // is not written in every layer could look new (flags.cuh).
  u32* const lse_out = p.lse + kv * GROUP * HEAD_DIM / LSE_COLUMNS * 32;
  const int idle = split.index < split.outputs ? split.index + most_splits : split.index;
#pragma unroll 1
  for (int output = idle; output < FEW_SPLITS; output += most_splits) {
    u32* const to = p.out + output * heads_size + kv * GROUP * HEAD_DIM;
    if (thread < GROUP * HEAD_DIM / 4) publish4(to + thread * 4, make_float4(0.f, 0.f, 0.f, 0.f), p.tag);
    if (thread < GROUP * HEAD_DIM / LSE_COLUMNS) publish(lse_out + thread * 32 + output, 0.f, p.tag);
  }
  if (split.index >= splits) return;
  const bool takes = warp < ((GROUP + 2) * LANES + 31) / 32;   // whole warps
  const TokenHead fresh(p, kv, thread);
  uint4 words[2] = {};
  if (takes) words[0] = load_words(fresh(0)), words[1] = load_words(fresh(1));
  const int first = split.first, origin = split.origin, unit_end = split.unit_end, last_unit = (p.position - origin) / UNIT;
  const u32 row_bytes = p.kv_heads * HEAD_DIM * 2;
  const u8* const keys = reinterpret_cast<const u8*>(p.keys + kv * HEAD_DIM + part * 8);
  const u8* const cached_values = reinterpret_cast<const u8*>(p.values + kv * HEAD_DIM + part * 8);
  const float cap_factor = 2.f / p.softcap;

  // Keys of the next unit are loaded as soon as scores are known, values as soon as they are added up; their slots a unit
  // earlier still. All of it but the new token was written by earlier launches, so the first unit is loaded before the wait.
  uint4 k[LOADS] = {}, v[LOADS] = {};   // zero: a register that is set in one branch only would be kept from the kernel's start
  u32 slots[LOADS] = {};
  auto slot_of = [&](int token) {
    token = min(max(token, first), p.position);   // a real one
    return ((u32)__ldg(p.table + (token >> p.block_shift)) << p.block_shift) + (token & ((1 << p.block_shift) - 1));
  };
  auto find = [&](int unit) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) slots[j] = slot_of(origin + unit * UNIT + j * TOKENS + sub);
  };
  auto fetch = [&](const u8* from, uint4 (&to)[LOADS]) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) to[j] = __ldcg(reinterpret_cast<const uint4*>(from + (u64)slots[j] * row_bytes));
  };
  auto prefetch = [&](int unit) {
    if (unit < unit_end) prefetch_row(p.keys, p.values, slot_of(origin + unit * UNIT + prefetched_token(lane)), p.kv_heads, lane);
  };
  int unit = split.unit + warp;
  if (unit < unit_end) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) slots[j] = split.slots[warp * UNIT + j * TOKENS + sub];
    fetch(keys, k), fetch(cached_values, v);
  }
  if (unit + WARPS < unit_end) {
    find(unit + WARPS);
#pragma unroll 1
    for (int i = 1; i <= UNITS_AHEAD; ++i) prefetch(unit + i * WARPS);
  }

  if (takes) take_token(p, split, s, kv, fresh, words);
  __syncthreads();
  __syncwarp();   // see block_sums in residual.cuh
  float query[GROUP][8];
#pragma unroll
  for (int g = 0; g < GROUP; ++g) load8(s.query + g * HEAD_DIM + part * 8, query[g]);

  Softmax softmax;
#pragma unroll 1
  while (unit < unit_end) {
    __syncwarp();
    const int token0 = origin + unit * UNIT + sub;
    if (unit == last_unit) {   // the new token never passes through memory
      const uint4 key = *reinterpret_cast<const uint4*>(s.fresh + part * 8);
      const uint4 value = *reinterpret_cast<const uint4*>(s.fresh + HEAD_DIM + part * 8);
#pragma unroll
      for (int j = 0; j < LOADS; ++j) {
        if (token0 + j * TOKENS >= p.position) k[j] = key, v[j] = value;
      }
    }
    float score[Softmax::SCORES];
    Softmax::multiply(query, k, score);
    const bool more = unit + WARPS < unit_end;
    if (more) fetch(keys, k);
    if (more) prefetch(unit + (1 + UNITS_AHEAD) * WARPS);
    softmax.weigh(score, token0, first, p.position, p.softcap, cap_factor, lane);
    softmax.add(score, v);
    if (more) fetch(cached_values, v);
    unit += WARPS;
    if (unit + WARPS < unit_end) find(unit + WARPS);
  }
  __syncwarp();
  softmax.store(s.values + warp * GROUP * HEAD_DIM, s.tops + warp, s.totals + warp, WARPS, lane);
  __syncthreads();

  const int vec = this_thread();
  u64* const values = p.partial + (size_t)kv * most_splits * GROUP * HEAD_DIM;
  u64* const lses = p.partial + (size_t)p.kv_heads * most_splits * GROUP * HEAD_DIM + kv * most_splits * GROUP;
  if (vec < GROUP * HEAD_DIM / 4) {   // combine the block's warps
    const int g = vec * 4 / HEAD_DIM;
    float score, weights;
    const float4 sum = combine_warps<WARPS>(s.values, s.tops, s.totals, g, vec * 4 % HEAD_DIM, score, weights);
    const float4 mean = scaled4(sum, __fdividef(1.f, weights));
    const float lse = score + __logf(weights);
    if (splits <= FEW_SPLITS) {
      publish4(p.out + split.index * heads_size + kv * GROUP * HEAD_DIM + vec * 4, mean, p.tag);
      if (vec * 4 % LSE_COLUMNS == 0) publish(lse_out + vec * 4 / LSE_COLUMNS * 32 + split.index, lse, p.tag);
    } else {
      u64* const to = values + split.index * GROUP * HEAD_DIM + vec * 4;
      publish_packet(to, mean.x, p.tag), publish_packet(to + 1, mean.y, p.tag);
      publish_packet(to + 2, mean.z, p.tag), publish_packet(to + 3, mean.w, p.tag);
      if (vec * 4 % HEAD_DIM == 0) publish_packet(lses + split.index * GROUP + g, lse, p.tag);
    }
  }
  if (splits > FEW_SPLITS) {
    if (vec < GROUP * HEAD_DIM / LSE_COLUMNS && split.index == 0) publish(lse_out + vec * 32, 0.f, p.tag);
    combine_splits(p, split, s, values, lses, p.out + kv * GROUP * HEAD_DIM);
  }
}

// x = the attention's result, `columns` of it: the splits of `out`, combined by their log-sum-exp.
__device__ __forceinline__ void gather_splits(u8* xs, const u32* out, const u32* lse, int outputs, int columns, u32 tag) {
  constexpr int EACH = FEW_SPLITS + 1;   // a column's uint4s: of the splits, then their log-sum-exp
  const int thread = this_thread();
#pragma unroll 1
  for (int first = 0; first * 4 < columns; first += WARPS * 32 * SPLIT_FLOAT4S) {
    uint4 words[SPLIT_FLOAT4S * EACH] = {};
    auto column = [&](int i) { return (first + thread + i * WARPS * 32) * 4; };
    auto at = [&](int i) {
      const int output = i % EACH;
      return output < FEW_SPLITS ? out + output * columns + column(i / EACH) : lse + column(i / EACH) / LSE_COLUMNS * 32;
    };
    u32 wanted = 0;
#pragma unroll
    for (int i = 0; i < SPLIT_FLOAT4S * EACH; ++i) {
      const bool filled = i % EACH < outputs || i % EACH == FEW_SPLITS;
      if (filled && column(i / EACH) < columns) words[i] = load_words(at(i)), wanted |= 1u << i;
    }
    await_words(words, tag, wanted, at);
#pragma unroll
    for (int i = 0; i < SPLIT_FLOAT4S; ++i) {
      if (!(wanted >> i * EACH & 1)) continue;
      const float4 all = value4(words[i * EACH + FEW_SPLITS]);
      const float lses[FEW_SPLITS] = {all.x, all.y, all.z, all.w};
      float best = lses[0], weights = 0.f;
#pragma unroll
      for (int r = 1; r < FEW_SPLITS; ++r) best = r < outputs ? fmaxf(best, lses[r]) : best;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int r = 0; r < FEW_SPLITS; ++r) {
        const float weight = r < outputs ? __expf(lses[r] - best) : 0.f;
        const float4 v = scaled4(value4(words[i * EACH + r]), weight);
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w), weights += weight;
      }
      *reinterpret_cast<uint2*>(xs + column(i) * 2) = pack4(scaled4(sum, __fdividef(1.f, weights)));
    }
  }
}
