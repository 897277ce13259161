// Computes: one token drawn from each row of logits, with temperature, top-k, top-p and min-p
// Shapes: logits fp32 [m, vocabulary]; params fp64 [m, 5] (see struct Draw) -> ids, exact int32 [m]
// Runs: sampling/draw.py, for gemcut.engine.draw_graphs; grid [parts of 2048 tokens, rows]
// Schedule: one launch; bitonic sort of parts (Batcher 1968), a row's last block merges and samples by prefix sums
// Invariants: draws what gemcut.engine.draw draws; exact = 0 where logits are not numbers: the token is then any
//
// Each row has its own temperature and filters. With a filter each block passes on a list of its LIST likeliest tokens. The row's
// last block sorts the beginnings of those lists, or all of them. A token that a part does not pass on is no likelier than the last
// one taken of its list. So every token that is at least as likely as the likeliest of these last ones is there, but for ties: their
// number is `complete`. top_p and min_p without a top_k compare with the mass of the whole row; where they keep more tokens than
// are complete, the draw is not exact.

constexpr int THREADS = 1024, PART = 2 * THREADS, LIST = 64, MOST_PARTS = 128, CANDIDATES = MOST_PARTS * LIST, EACH = CANDIDATES / THREADS;

struct Draw {
  const float* logits;     // [m, vocabulary]
  const double* params;    // [m, 5]: 1 / temperature, top_p (above 1: all), min_p, a uniform number, top_k (at most LIST; 0: all)
  u64* lists;              // [m, parts, LIST]: see entry_of
  float2* sums;            // [m, parts]: the largest logit; the sum of exp((logit - largest) / temperature)
  u32* arrivals;           // [m], zero between launches
  int* ids;                // [m]: the token
  int* exact;              // [m]: 0 where logits are not numbers or the lists too short; `ids` then gets any token
  float softcap;           // 0: none
  int vocabulary;
};
constexpr int PARAMS = 5;

// A logit and its index as one number, likelier ones larger, the first of equal ones largest; 0 is none.
__device__ __forceinline__ u64 entry_of(float logit, u32 index) {
  const u32 bits = __float_as_uint(logit), key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (u64)key << 32 | (0xffffffffu - index);
}
__device__ __forceinline__ float logit_of(u64 entry) {
  const u32 key = entry >> 32;
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ int token_of(u64 entry) { return 0xffffffffu - (u32)entry; }

// Bitonic: the largest come first. The entries are sorted already, in sequences of `sorted`, every second one backwards. A warp has
// the same 64 entries in all exchanges of up to 32 places, which need no barrier of the block.
__device__ __forceinline__ void sort_entries(u64* entries, int count, int sorted) {
  __syncthreads();
#pragma unroll 1
  for (int size = 2 * sorted; size <= count; size *= 2) {
#pragma unroll 1
    for (int gap = size / 2; gap > 0; gap /= 2) {
#pragma unroll 1
      for (int pair = threadIdx.x; pair < count / 2; pair += THREADS) {
        const int low = 2 * pair - (pair & (gap - 1)), high = low + gap;
        const u64 a = entries[low], b = entries[high];
        if ((a < b) == ((low & size) == 0)) entries[low] = b, entries[high] = a;
      }
      if (gap > 32 || (gap == 1 && size >= 64)) __syncthreads();
      else __syncwarp();
    }
  }
  __syncthreads();
}

__device__ __forceinline__ float block_max(float value, float* scratch) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[threadIdx.x % 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

// The sum of the values of all threads before this one; `total` gets that of all.
__device__ __forceinline__ double sum_before(double value, double* scratch, double& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double up_to = value;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, up_to, lanes);
    if (lane >= lanes) up_to += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = up_to;
  __syncthreads();
  double warps = scratch[lane];
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, warps, lanes);
    if (lane >= lanes) warps += other;
  }
  total = __shfl_sync(0xffffffffu, warps, 31);
  const double before = __shfl_sync(0xffffffffu, warps, max(warp - 1, 0));
  return (warp > 0 ? before : 0.0) + up_to - value;
}

struct Scratch {
  float floats[32];
  double doubles[32];
  int first, last;
};

__device__ __forceinline__ float capped(float logit, float softcap) { return softcap > 0.f ? softcap * tanhf(logit / softcap) : logit; }
__device__ __forceinline__ float weight_of(float logit, float largest, float inverse) {
  return logit == MINUS_INFINITY ? 0.f : expf((logit - largest) * inverse);
}

// The share of this thread's part in the row's mass; the likeliest token has 1.
__device__ __forceinline__ double part_mass(const float2* sums, int parts, float largest, float inverse) {
  const float2 part = threadIdx.x < parts ? __ldcg(sums + threadIdx.x) : make_float2(MINUS_INFINITY, 0.f);
  return part.y * (double)weight_of(part.x, largest, inverse);
}

// Any token may be drawn: the first at which the sum of all before and itself passes the point.
__device__ __forceinline__ void draw_any(const Draw& p, Scratch& s, const float2* sums, float largest, float inverse, double uniform) {
  const int row = blockIdx.y, parts = gridDim.x, thread = threadIdx.x;
  const double mass = part_mass(sums, parts, largest, inverse);
  double total, all;
  const double before = sum_before(mass, s.doubles, total), point = uniform * total;
  if (thread == 0) s.first = MOST_PARTS, s.last = 0;
  __syncthreads();
  if (mass > 0.0) {
    if (before + mass > point) atomicMin(&s.first, thread);
    atomicMax(&s.last, thread);
  }
  __syncthreads();
  const int chosen = min(s.first, s.last);
  __syncthreads();
  if (thread == chosen) s.doubles[0] = before;
  if (thread == 0) s.first = PART, s.last = 0;
  __syncthreads();
  const double start = s.doubles[0];
  __syncthreads();
  const float* const logits = p.logits + (size_t)row * p.vocabulary + chosen * PART;
  const int count = min(PART, p.vocabulary - chosen * PART);
  float weights[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = 2 * thread + i;
    weights[i] = at < count ? weight_of(capped(logits[at], p.softcap), largest, inverse) : 0.f;
  }
  double sum = start + sum_before((double)weights[0] + weights[1], s.doubles, all);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum += weights[i];
    if (weights[i] > 0.f) {   // what cannot be is never drawn, however sums round
      if (sum > point) atomicMin(&s.first, 2 * thread + i);
      atomicMax(&s.last, 2 * thread + i);
    }
  }
  __syncthreads();
  if (thread == 0) p.ids[row] = chosen * PART + min(s.first, s.last);
}

// Only the likeliest may be drawn: top_k of them, or where that is 0 as many as top_p and min_p keep of all. From the first `take`
// of each list; whether those were enough.
__device__ __forceinline__ bool draw_likeliest(const Draw& p, Scratch& s, u64* entries, const float2* sums, float largest, float inverse,
                                               const double* params, int top_k, int take) {
  const int row = blockIdx.y, parts = gridDim.x, thread = threadIdx.x;
  const u64* const lists = p.lists + (size_t)row * parts * LIST;
  auto listed = [&](int part, int i) { return __ldcg(lists + part * LIST + (part % 2 ? LIST - 1 - i : i)); };
  const int size = max(2 * take, 1 << (32 - __clz(parts * take - 1)));
#pragma unroll 1
  for (int i = thread; i < size; i += THREADS) {   // every second sequence backwards, as the sort wants them
    const int part = i / take, index = i % take;
    entries[i] = part < parts ? listed(part, part % 2 ? take - 1 - index : index) : 0;
  }
  // Of the parts that hold tokens back, the likeliest last one that is here.
  float held_back = MINUS_INFINITY;
  if (thread < parts && p.vocabulary - thread * PART > take) held_back = logit_of(listed(thread, take - 1));
  held_back = block_max(held_back, s.floats);
  sort_entries(entries, size, take);

  float weights[EACH];
  int complete = 0;
  double kept_mass = 0.0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = thread * EACH + i;
    const u64 entry = at < size ? entries[at] : 0;
    weights[i] = entry != 0 ? weight_of(logit_of(entry), largest, inverse) : 0.f;
    complete += entry != 0 && logit_of(entry) >= held_back;
    if (at < top_k) kept_mass += weights[i];
  }
  if (top_k == 0) kept_mass = part_mass(sums, parts, largest, inverse);
  double whole, mass;
  sum_before(complete, s.doubles, whole);
  sum_before(kept_mass, s.doubles, mass);
  const int limit = top_k > 0 ? min(top_k, p.vocabulary) : (int)whole;
  if (limit > (int)whole || whole == 0.0) return false;
  const float total = (float)mass, floor = (float)params[2] * (weight_of(logit_of(entries[0]), largest, inverse) / total);

  double sum = 0.0, unused;
#pragma unroll
  for (int i = 0; i < EACH; ++i) weights[i] /= total, sum += weights[i];
  const double before = sum_before(sum, s.doubles, unused);
  if (thread == 0) s.first = CANDIDATES, s.last = 0;
  __syncthreads();
  int last = -1;
  double last_sum = 0.0;
  sum = before;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {   // kept is a beginning: both conditions fail for good
    const int at = thread * EACH + i;
    const bool kept = at == 0 || (at < limit && sum < params[1] && weights[i] >= floor);
    sum += weights[i];
    if (kept) last = at, last_sum = sum;
  }
  if (last >= 0) atomicMax(&s.last, last);
  __syncthreads();
  const int end = s.last;
  // Without a top_k the token behind the last one kept must be known to be cut off.
  if (top_k == 0 && end == limit - 1 && limit < p.vocabulary) return false;
  if (last == end) s.doubles[0] = last_sum;
  __syncthreads();
  const double point = params[3] * s.doubles[0];
  sum = before;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    sum += weights[i];
    if (thread * EACH + i <= end && sum > point) atomicMin(&s.first, thread * EACH + i);
  }
  __syncthreads();
  if (thread == 0) p.ids[row] = token_of(entries[min(s.first, end)]);
  return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) draw(Draw p) {
  extern __shared__ u64 entries[];
  __shared__ Scratch s;
  __shared__ bool is_last;
  const int row = blockIdx.y, parts = gridDim.x, part = blockIdx.x, thread = threadIdx.x;
  next_kernel_may_start();
  previous_kernels_done();
  const double* const params = p.params + row * PARAMS;
  const float inverse = (float)params[0];
  const int top_k = (int)params[4];
  const bool filtered = top_k > 0 || params[1] < 1.0 || params[2] > 0.0;
  const float* const logits = p.logits + (size_t)row * p.vocabulary;
  float values[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = part * PART + thread + i * THREADS;
    values[i] = at < p.vocabulary ? capped(logits[at], p.softcap) : MINUS_INFINITY;
    if (filtered) entries[thread + i * THREADS] = at < p.vocabulary ? entry_of(values[i], at) : 0;
  }
  float largest = block_max(fmaxf(values[0], values[1]), s.floats);
  double mass;
  sum_before((double)weight_of(values[0], largest, inverse) + weight_of(values[1], largest, inverse), s.doubles, mass);
  if (thread == 0) p.sums[row * parts + part] = make_float2(largest, (float)mass);
  if (filtered) {
    sort_entries(entries, PART, 1);
    // Every second list backwards, as the last block's sort wants them.
    if (thread < LIST) p.lists[((size_t)row * parts + part) * LIST + thread] = entries[part % 2 ? LIST - 1 - thread : thread];
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicAdd(p.arrivals + row, 1u) == parts - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const float2* const sums = p.sums + row * parts;
  largest = block_max(thread < parts ? __ldcg(sums + thread).x : MINUS_INFINITY, s.floats);
  bool exact = true;
  if (filtered) {
    exact = false;   // few are mostly enough, and much sooner sorted
#pragma unroll 1
    for (int take = LIST / 8; take <= LIST && !exact; take *= 8) {
      __syncthreads();
      exact = draw_likeliest(p, s, entries, sums, largest, inverse, params, top_k, take);
    }
  } else {
    draw_any(p, s, sums, largest, inverse, params[3]);
  }
  if (thread == 0) {
    if (!exact) p.ids[row] = token_of(entries[0]);
    p.exact[row] = exact, p.arrivals[row] = 0;
  }
}
