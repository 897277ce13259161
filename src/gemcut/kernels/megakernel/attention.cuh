// The attention of the decode step: one new token over the paged cache, by all warps of the blocks of one running launch, from
// words (words.cuh) to words.
//
// A block owns one key head and a run of its tokens, the new one included. Its warps' softmaxes are joined in shared memory. A
// few runs of a head stand side by side in `out`, and who reads them joins them (gather_runs); many are joined by their own
// blocks first, each for its share of the head's columns. The order is always the same.

struct Attention {
  const u32* qkv;        // words [(GROUP + 2) * kv_heads * HEAD_DIM]: queries, keys, values
  u32* out;              // words [FEW_RUNS, GROUP * kv_heads * HEAD_DIM]
  u32* shares;           // words [GROUP * kv_heads * HEAD_DIM / SHARED_COLUMNS, 32]: the first FEW_RUNS are logarithms of runs' weights
  u64* partial;          // packets [kv_heads, most runs, GROUP, HEAD_DIM], then [kv_heads, most runs, GROUP]
  u16* keys;             // this layer's: [blocks, block size, kv_heads, HEAD_DIM]
  u16* values;
  const int* table;      // the cache block of each run of block-size tokens
  const float* norms;    // [2, HEAD_DIM]: of queries and of keys, or null
  float scale, softcap, eps;   // softcap 0: none
  int kv_heads, block_shift, position;
  u32 tag;
};

constexpr int WARPS = BLOCK_WARPS;
static_assert(FEW_RUNS == 4, "the weights of the runs that stand side by side are one four of words");
// So many columns have a line of memory for the weights of their runs: all blocks look at it, and one line for all heads would
// answer some thousand warps one by one.
constexpr int SHARED_COLUMNS = HEAD_DIM < 128 ? HEAD_DIM : 128;
constexpr int FEW_UNITS = 2;      // a warp's, before a head's tokens are split further
constexpr int UNITS_AHEAD = 2;    // that the second-level cache is asked for beyond the next one

// What a block reads of the cache: the same in all layers that attend to the whole context, and in all that slide. It is laid
// out once, so that a layer's first reads wait for nothing.
struct Run {
  int index, count;                  // which of its head's runs, if it is less than their count
  int pieces;                        // of `out` that are to be joined
  int first, origin, unit, unit_end;   // the first token attended to; where units are counted from; the block's units
  u32 new_place;                     // the new token's place in the cache
  __align__(16) float rope[HEAD_DIM];   // the position's cosines, then its sines
  u32 places[WARPS * UNIT];          // of the tokens of each warp's first unit
};

// The attention's shared memory.
struct States {
  float values[WARPS * GROUP * HEAD_DIM];   // of each warp
  float query[GROUP * HEAD_DIM];            // the new token's, rotated and scaled
  u16 fresh[2 * HEAD_DIM];                  // its key and value
  __align__(16) float tops[GROUP * WARPS], totals[GROUP * WARPS];
  float4 runs[WARPS * 32];                  // a column's value, largest score and weights over some runs
};

// window 0: the whole context. All threads of the block call it.
__device__ __forceinline__ void plan_run(Run& run, int position, int window, int kv_heads, int block_shift, const int* table,
                                         const float* rope) {
  const int most = gridDim.x / kv_heads, index = blockIdx.x / kv_heads, few = min(most, FEW_RUNS);
  const int first = window > 0 ? max(0, position - window + 1) : 0;
  const int origin = first / UNIT * UNIT;
  const int units = (position - origin) / UNIT + 1;
  const int over = units <= few * WARPS * FEW_UNITS ? few : most;
  const int each = max((units + over - 1) / over, WARPS);
  const int begin = index * each, end = min(units, begin + each), count = (units + each - 1) / each;
  auto place = [&](int token) { return ((u32)table[token >> block_shift] << block_shift) + (token & ((1 << block_shift) - 1)); };
  if (threadIdx.x == 0) {
    run.index = index, run.count = count, run.pieces = count <= FEW_RUNS ? count : 1;
    run.first = first, run.origin = origin, run.unit = begin, run.unit_end = end, run.new_place = place(position);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < WARPS * UNIT; i += WARPS * 32) {
    run.places[i] = place(min(max(origin + begin * UNIT + i, first), position));   // of a real token
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < HEAD_DIM; i += WARPS * 32) run.rope[i] = rope[i];
}

// Asks the second-level cache for a key or a value at one of a unit's places: half a warp's lanes for each, one line a lane.
constexpr int LINES = HEAD_DIM > 64 ? HEAD_DIM / 64 : 1;   // of a row
__device__ __forceinline__ int asked_token(int lane) { return min(lane % 16 / LINES, UNIT - 1); }
__device__ __forceinline__ void ask_for(const u16* keys, const u16* values, u32 place, int kv_heads, int lane) {
  const size_t at = ((size_t)place * kv_heads + blockIdx.x % kv_heads) * HEAD_DIM + lane % LINES * 64;
  asm volatile("prefetch.global.L2 [%0];" ::"l"((lane < 16 ? keys : values) + at));
}

// Where LANES lanes find one of the new token's heads (queries, key, value; the last lanes may repeat the value): each takes fours
// of its two halves.
struct Place {
  int head, column;
  const u32* from;
  __device__ __forceinline__ Place(const Attention& p, int kv, int thread) {
    head = min(thread / LANES, GROUP + 1), column = thread % LANES * 4;
    from = p.qkv + (head < GROUP ? kv * GROUP + head : head * p.kv_heads + kv) * HEAD_DIM + column;
  }
  __device__ __forceinline__ const u32* operator()(int half) const { return from + half * (HEAD_DIM / 2); }
};

// The new token, whose words were asked for, normalised where wanted and rotated, to shared memory; the last run's block writes
// the cache.
__device__ __forceinline__ void take_token(const Attention& p, const Run& run, States& s, int kv, const Place& place, uint4 (&words)[2]) {
  const int head = place.head, column = place.column;
  float4 scales[2] = {};
  if (p.norms != nullptr) {
    const float* const norm = p.norms + (head == GROUP ? HEAD_DIM : 0) + column;
    scales[0] = read4(norm), scales[1] = read4(norm + HEAD_DIM / 2);
  }
  const float4 cosine = read4(run.rope + column), sine = read4(run.rope + HEAD_DIM / 2 + column);
  await_words(words, p.tag, 3, place);
  float4 low = value4(words[0]), high = value4(words[1]);
  if (p.norms != nullptr) {
    __syncwarp();
    const float scale = rsqrtf(sum_lanes<LANES>(dot4(low, low) + dot4(high, high)) / HEAD_DIM + p.eps);
    if (head <= GROUP) low = scaled4(product4(low, scales[0]), scale), high = scaled4(product4(high, scales[1]), scale);
  }
  if (head <= GROUP) {
    const float4 a = product4(low, cosine), b = product4(high, sine), c = product4(high, cosine), d = product4(low, sine);
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
  if (run.index == run.count - 1) {
    put((head == GROUP ? p.keys : p.values) + ((size_t)run.new_place * p.kv_heads + kv) * HEAD_DIM);
  }
}

// Joins a head's runs, more than FEW_RUNS, for this block's share of its columns. A column's runs are dealt to several threads.
__device__ __forceinline__ void join_runs(const Attention& p, const Run& run, States& s, const u64* values, const u64* scores, u32* out) {
  constexpr int AHEAD = 4;
  const int thread = this_thread(), begin = run.index * GROUP * HEAD_DIM / run.count;
  const int columns = (run.index + 1) * GROUP * HEAD_DIM / run.count - begin;
  const int width = (columns + 31) / 32 * 32, slots = min(WARPS * 32 / width, run.count), slot = thread / width;
  const int i = begin + min(thread % width, columns - 1), g = i / HEAD_DIM;
  if (slot < slots) {
    float best = MINUS_INFINITY, value = 0.f, weights = 0.f;
#pragma unroll 1
    for (int r0 = slot; r0 < run.count; r0 += slots * AHEAD) {
      u64 packets[2 * AHEAD] = {};
      auto at = [&](int j) {
        const int r = r0 + j / 2 * slots;
        return j % 2 == 0 ? values + (size_t)r * GROUP * HEAD_DIM + i : scores + r * GROUP + g;
      };
      u32 wanted = 0;
#pragma unroll
      for (int j = 0; j < 2 * AHEAD; ++j) {
        if (r0 + j / 2 * slots < run.count) packets[j] = load_packet(at(j)), wanted |= 1u << j;
      }
      await_packets(packets, p.tag, wanted, at);
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        const float score = wanted >> 2 * j & 1 ? packet_value(packets[2 * j + 1]) : MINUS_INFINITY, higher = fmaxf(best, score);
        const float keep = weight_of(best, higher), weight = weight_of(score, higher);
        best = higher, value = value * keep + weight * packet_value(packets[2 * j]), weights = weights * keep + weight;
      }
    }
    s.runs[thread] = make_float4(value, best, weights, 0.f);
  }
  __syncthreads();
  if (thread < columns) {
    float best = MINUS_INFINITY, value = 0.f, weights = 0.f;
#pragma unroll 4
    for (int j = 0; j < slots; ++j) best = fmaxf(best, s.runs[j * width + thread].y);
#pragma unroll 4
    for (int j = 0; j < slots; ++j) {
      const float4 part = s.runs[j * width + thread];
      const float weight = weight_of(part.y, best);
      value += weight * part.x, weights += weight * part.z;
    }
    publish(out + begin + thread, value / weights, p.tag);
  }
}

// All threads of the block call it.
__device__ __forceinline__ void attend(const Attention& p, const Run& run, States& s) {
  const int thread = this_thread();
  const int kv = blockIdx.x % p.kv_heads, most_runs = gridDim.x / p.kv_heads, runs = run.count;
  const int warp = thread / 32, lane = thread % 32, part = lane % LANES, sub = lane / LANES;
  const int heads_size = GROUP * p.kv_heads * HEAD_DIM;
  // Places of `out` that no run fills are written all the same: a place keeps its tag until it is written again, so one that
  // is not written in every layer could look new (words.cuh).
  u32* const shares = p.shares + kv * GROUP * HEAD_DIM / SHARED_COLUMNS * 32;
  const int idle = run.index < run.pieces ? run.index + most_runs : run.index;
#pragma unroll 1
  for (int piece = idle; piece < FEW_RUNS; piece += most_runs) {
    u32* const to = p.out + piece * heads_size + kv * GROUP * HEAD_DIM;
    if (thread < GROUP * HEAD_DIM / 4) publish4(to + thread * 4, make_float4(0.f, 0.f, 0.f, 0.f), p.tag);
    if (thread < GROUP * HEAD_DIM / SHARED_COLUMNS) publish(shares + thread * 32 + piece, 0.f, p.tag);
  }
  if (run.index >= runs) return;
  const bool takes = warp < ((GROUP + 2) * LANES + 31) / 32;   // whole warps
  const Place fresh(p, kv, thread);
  uint4 words[2] = {};
  if (takes) words[0] = load_words(fresh(0)), words[1] = load_words(fresh(1));
  const int first = run.first, origin = run.origin, unit_end = run.unit_end, last_unit = (p.position - origin) / UNIT;
  const u32 row_bytes = p.kv_heads * HEAD_DIM * 2;
  const u8* const keys = reinterpret_cast<const u8*>(p.keys + kv * HEAD_DIM + part * 8);
  const u8* const cached_values = reinterpret_cast<const u8*>(p.values + kv * HEAD_DIM + part * 8);
  const float cap_factor = 2.f / p.softcap;

  // Keys of the next unit are fetched as soon as scores are known, values as soon as they are added up; their places a unit
  // earlier still. All of it but the new token was written by earlier launches, so the first unit is fetched before the wait.
  uint4 k[LOADS] = {}, v[LOADS] = {};   // zero: a register that is set in one branch only would be kept from the kernel's start
  u32 places[LOADS] = {};
  auto place = [&](int token) {
    token = min(max(token, first), p.position);   // a real one
    return ((u32)__ldg(p.table + (token >> p.block_shift)) << p.block_shift) + (token & ((1 << p.block_shift) - 1));
  };
  auto find = [&](int unit) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) places[j] = place(origin + unit * UNIT + j * TOKENS + sub);
  };
  auto fetch = [&](const u8* from, uint4 (&to)[LOADS]) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) to[j] = __ldcg(reinterpret_cast<const uint4*>(from + (u64)places[j] * row_bytes));
  };
  auto ask = [&](int unit) {
    if (unit < unit_end) ask_for(p.keys, p.values, place(origin + unit * UNIT + asked_token(lane)), p.kv_heads, lane);
  };
  int unit = run.unit + warp;
  if (unit < unit_end) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) places[j] = run.places[warp * UNIT + j * TOKENS + sub];
    fetch(keys, k), fetch(cached_values, v);
  }
  if (unit + WARPS < unit_end) {
    find(unit + WARPS);
#pragma unroll 1
    for (int i = 1; i <= UNITS_AHEAD; ++i) ask(unit + i * WARPS);
  }

  if (takes) take_token(p, run, s, kv, fresh, words);
  __syncthreads();
  __syncwarp();   // see block_sums in step_stream.cuh
  float query[GROUP][8];
#pragma unroll
  for (int g = 0; g < GROUP; ++g) load8(s.query + g * HEAD_DIM + part * 8, query[g]);

  Softmax mixture;
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
    if (more) ask(unit + (1 + UNITS_AHEAD) * WARPS);
    mixture.weigh(score, token0, first, p.position, p.softcap, cap_factor, lane);
    mixture.add(score, v);
    if (more) fetch(cached_values, v);
    unit += WARPS;
    if (unit + WARPS < unit_end) find(unit + WARPS);
  }
  __syncwarp();
  mixture.store(s.values + warp * GROUP * HEAD_DIM, s.tops + warp, s.totals + warp, WARPS, lane);
  __syncthreads();

  const int four = this_thread();
  u64* const values = p.partial + (size_t)kv * most_runs * GROUP * HEAD_DIM;
  u64* const scores = p.partial + (size_t)p.kv_heads * most_runs * GROUP * HEAD_DIM + kv * most_runs * GROUP;
  if (four < GROUP * HEAD_DIM / 4) {   // join the block's warps
    const int g = four * 4 / HEAD_DIM;
    float score, weights;
    const float4 sum = joined_warps<WARPS>(s.values, s.tops, s.totals, g, four * 4 % HEAD_DIM, score, weights);
    const float4 mean = scaled4(sum, __fdividef(1.f, weights));
    const float share = score + __logf(weights);
    if (runs <= FEW_RUNS) {
      publish4(p.out + run.index * heads_size + kv * GROUP * HEAD_DIM + four * 4, mean, p.tag);
      if (four * 4 % SHARED_COLUMNS == 0) publish(shares + four * 4 / SHARED_COLUMNS * 32 + run.index, share, p.tag);
    } else {
      u64* const to = values + run.index * GROUP * HEAD_DIM + four * 4;
      publish_packet(to, mean.x, p.tag), publish_packet(to + 1, mean.y, p.tag);
      publish_packet(to + 2, mean.z, p.tag), publish_packet(to + 3, mean.w, p.tag);
      if (four * 4 % HEAD_DIM == 0) publish_packet(scores + run.index * GROUP + g, share, p.tag);
    }
  }
  if (runs > FEW_RUNS) {
    if (four < GROUP * HEAD_DIM / SHARED_COLUMNS && run.index == 0) publish(shares + four * 32, 0.f, p.tag);
    join_runs(p, run, s, values, scores, p.out + kv * GROUP * HEAD_DIM);
  }
}

// x = the attention's result, `columns` of it, joined from the pieces of `out` by their runs' weights.
__device__ __forceinline__ void gather_runs(u8* xs, const u32* out, const u32* shares, int pieces, int columns, u32 tag) {
  constexpr int EACH = FEW_RUNS + 1;   // a column's fours: of the runs, then their weights
  const int thread = this_thread();
#pragma unroll 1
  for (int first = 0; first * 4 < columns; first += WARPS * 32 * RUN_FOURS) {
    uint4 words[RUN_FOURS * EACH] = {};
    auto column = [&](int i) { return (first + thread + i * WARPS * 32) * 4; };
    auto at = [&](int i) {
      const int piece = i % EACH;
      return piece < FEW_RUNS ? out + piece * columns + column(i / EACH) : shares + column(i / EACH) / SHARED_COLUMNS * 32;
    };
    u32 wanted = 0;
#pragma unroll
    for (int i = 0; i < RUN_FOURS * EACH; ++i) {
      const bool filled = i % EACH < pieces || i % EACH == FEW_RUNS;
      if (filled && column(i / EACH) < columns) words[i] = load_words(at(i)), wanted |= 1u << i;
    }
    await_words(words, tag, wanted, at);
#pragma unroll
    for (int i = 0; i < RUN_FOURS; ++i) {
      if (!(wanted >> i * EACH & 1)) continue;
      const float4 all = value4(words[i * EACH + FEW_RUNS]);
      const float scores[FEW_RUNS] = {all.x, all.y, all.z, all.w};
      float best = scores[0], weights = 0.f;
#pragma unroll
      for (int r = 1; r < FEW_RUNS; ++r) best = r < pieces ? fmaxf(best, scores[r]) : best;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int r = 0; r < FEW_RUNS; ++r) {
        const float weight = r < pieces ? __expf(scores[r] - best) : 0.f;
        const float4 v = scaled4(value4(words[i * EACH + r]), weight);
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w), weights += weight;
      }
      *reinterpret_cast<uint2*>(xs + column(i) * 2) = pack4(scaled4(sum, __fdividef(1.f, weights)));
    }
  }
}
