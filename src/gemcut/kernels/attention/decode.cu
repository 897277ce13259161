// Computes: attention of one new token of each sequence over the paged cache; rotation and the cache write are inside
// Shapes: qkv bf16 [m, (heads + 2 kv_heads) D]; cache bf16 [blocks, block size, kv_heads, D]; out bf16 [m, heads D]
// Runs: attention/decode.py; grid [splits, key heads, sequences], a block for one split of one key head
// Schedule: flash-decoding (split-KV, Dao et al. 2023) over a paged cache (arXiv 2309.06180), in one launch
// Invariants: fixed order of sums; arrivals are zero between launches; a negative position leaves its row unwritten
//
// GROUP query heads share the key head. A block's warps each keep an online softmax (attention.cuh); the block combines them, and
// the last block of a head to finish combines the splits. The new token never passes through memory: the warp that has its unit
// takes it from registers.
//
// Compiled after launch.cuh, rope.cuh and attention.cuh.

struct Attention {
  const u16* qkv;        // bf16 [m, (GROUP + 2) * kv_heads * HEAD_DIM]: queries, keys, values
  u16* out;              // bf16 [m, GROUP * kv_heads * HEAD_DIM]
  u16* keys;             // this layer's: [blocks, block size, kv_heads, HEAD_DIM]
  u16* values;
  const int* table;      // [m, table_stride]: the block table, a cache block for each block-size tokens
  const int* positions;  // [m]: the new token's; negative: no sequence in this row
  const float* rope;     // [positions, HEAD_DIM]
  const float* q_norm;   // [HEAD_DIM] or null, k_norm too
  const float* k_norm;
  float* partial;        // [m, kv_heads, splits, GROUP, HEAD_DIM + 2]
  u32* arrivals;         // [m, kv_heads], zero between launches
  float scale, softcap, eps;   // softcap 0: none
  int kv_heads, table_stride, block_shift, window;   // window 0: the whole context
};

constexpr int MAX_SPLITS = 64, STATE = HEAD_DIM + 2;

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
decode_attention(Attention p) {
  __shared__ __align__(16) float states[WARPS * GROUP * HEAD_DIM];
  __shared__ __align__(16) float tops[GROUP * WARPS], totals[GROUP * WARPS];
  __shared__ float split_weight[GROUP][MAX_SPLITS];
  __shared__ bool is_last;
  const int split = blockIdx.x, kv = blockIdx.y, row = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, sub = lane / LANES;

  next_kernel_may_start();
  // Positions, the table and what is in the cache were written by earlier steps, between which launches do not overlap.
  const int position = p.positions[row];
  if (position < 0) {
    previous_kernels_done();
    return;
  }
  const int first = p.window > 0 ? max(0, position - p.window + 1) : 0;
  const int origin = first / UNIT * UNIT;
  const int units = (position - origin) / UNIT + 1;
  const int per_split = max((units + (int)gridDim.x - 1) / (int)gridDim.x, WARPS);
  const int splits = max(1, (units + per_split - 1) / per_split);
  if (split >= splits) return;
  const int unit_end = min(units, (split + 1) * per_split);
  const int* const table = p.table + (size_t)row * p.table_stride;
  const size_t token_stride = (size_t)p.kv_heads * HEAD_DIM, lane_at = (size_t)kv * HEAD_DIM + part * 8;
  const int block_mask = (1 << p.block_shift) - 1;

  // Software pipeline: a unit's keys are loaded as soon as the scores of the unit before are known, its values as soon as that
  // unit's are added up, so that loads are always in flight. Slots in the cache are looked up a unit earlier still.
  uint4 k[LOADS], v[LOADS];
  u32 slots[LOADS];
  auto find = [&](int unit) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      const int token = min(max(origin + unit * UNIT + j * TOKENS + sub, first), position);   // a real one; masked below
      slots[j] = ((u32)table[token >> p.block_shift] << p.block_shift) + (token & block_mask);
    }
  };
  auto fetch = [&](const u16* from, uint4 (&to)[LOADS]) {
#pragma unroll
    for (int j = 0; j < LOADS; ++j) to[j] = __ldcg(reinterpret_cast<const uint4*>(from + slots[j] * token_stride + lane_at));
  };
  int unit = split * per_split + warp;
  if (unit < unit_end) find(unit), fetch(p.keys, k), fetch(p.values, v);
  if (unit + WARPS < unit_end) find(unit + WARPS);

  previous_kernels_done();
  const u16* const qkv = p.qkv + (size_t)row * (GROUP + 2) * p.kv_heads * HEAD_DIM;
  const float* const rope = p.rope + (size_t)position * HEAD_DIM;
  const float cap_factor = 2.f / p.softcap;
  float query[GROUP][8];
#pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    rotated8<LANES>(qkv + (kv * GROUP + g) * HEAD_DIM, p.q_norm, p.eps, rope, part, query[g]);
#pragma unroll
    for (int i = 0; i < 8; ++i) query[g][i] *= p.scale;
  }

  Softmax softmax;
  while (unit < unit_end) {
    const int token0 = origin + unit * UNIT + sub;
    if (unit == units - 1) {   // the new token
      const u16* const key_row = qkv + (GROUP * p.kv_heads + kv) * HEAD_DIM;
      float rotated[8];
      rotated8<LANES>(key_row, p.k_norm, p.eps, rope, part, rotated);
      const uint4 key = pack8(rotated), value = *reinterpret_cast<const uint4*>(key_row + p.kv_heads * HEAD_DIM + part * 8);
      if (sub == 0) {
        const size_t at = (((size_t)table[position >> p.block_shift] << p.block_shift) + (position & block_mask)) * token_stride + lane_at;
        *reinterpret_cast<uint4*>(p.keys + at) = key;
        *reinterpret_cast<uint4*>(p.values + at) = value;
      }
#pragma unroll
      for (int j = 0; j < LOADS; ++j) {
        if (token0 + j * TOKENS >= position) k[j] = key, v[j] = value;
      }
    }
    float score[Softmax::SCORES];
    Softmax::multiply(query, k, score);
    const bool more = unit + WARPS < unit_end;
    if (more) fetch(p.keys, k);
    softmax.weigh(score, token0, first, position, p.softcap, cap_factor, lane);
    softmax.add(score, v);
    if (more) fetch(p.values, v);
    unit += WARPS;
    if (unit + WARPS < unit_end) find(unit + WARPS);
  }

  softmax.store(states + warp * GROUP * HEAD_DIM, tops + warp, totals + warp, WARPS, lane);
  __syncthreads();

  u16* const out = p.out + ((size_t)row * p.kv_heads + kv) * GROUP * HEAD_DIM;
  float* const partial = p.partial + ((size_t)row * p.kv_heads + kv) * gridDim.x * GROUP * STATE;
  for (int i = threadIdx.x * 4; i < GROUP * HEAD_DIM; i += WARPS * 128) {   // combine the block's warps
    const int g = i / HEAD_DIM, d = i % HEAD_DIM;
    float best, weights;
    const float4 value = combine_warps<WARPS>(states, tops, totals, g, d, best, weights);
    if (splits == 1) {
      const float share = 1.f / weights;
      *reinterpret_cast<uint2*>(out + i) =
          make_uint2(pack_bf16(value.x * share, value.y * share), pack_bf16(value.z * share, value.w * share));
    } else {
      float* const to = partial + (split * GROUP + g) * STATE;
      *reinterpret_cast<float2*>(to + d) = make_float2(value.x, value.y);
      *reinterpret_cast<float2*>(to + d + 2) = make_float2(value.z, value.w);
      if (d == 0) to[HEAD_DIM] = best, to[HEAD_DIM + 1] = weights;
    }
  }
  if (splits == 1) return;
  __syncthreads();
  u32* const arrivals = p.arrivals + row * p.kv_heads + kv;
  if (threadIdx.x == 0) {   // after the barrier above this releases the whole block's results and acquires the other blocks'
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
    is_last = before == splits - 1;
  }
  __syncthreads();
  if (!is_last) return;
  constexpr int EACH = (GROUP * HEAD_DIM + WARPS * 32 - 1) / (WARPS * 32), AHEAD = EACH > 4 ? 4 : 8;
  float early[EACH][AHEAD];   // the first splits' sums, loading while the splits' weights are computed
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = threadIdx.x + e * WARPS * 32, g = i / HEAD_DIM, d = i % HEAD_DIM;
#pragma unroll
    for (int r = 0; r < AHEAD; ++r) {
      early[e][r] = r < splits && g < GROUP ? __ldcg(partial + (r * GROUP + g) * STATE + d) : 0.f;
    }
  }
  if (warp < GROUP) {   // each split's weight, one query head a warp
    for (int g = warp; g < GROUP; g += WARPS) {
      float split_top[MAX_SPLITS / 32], split_total[MAX_SPLITS / 32], best = MINUS_INFINITY, weights = 0.f;
#pragma unroll
      for (int j = 0; j < MAX_SPLITS / 32; ++j) {
        const int r = lane + j * 32;
        const float* const state = partial + (r * GROUP + g) * STATE + HEAD_DIM;
        split_top[j] = r < splits ? __ldcg(state) : MINUS_INFINITY;
        split_total[j] = r < splits ? __ldcg(state + 1) : 0.f;
        best = fmaxf(best, split_top[j]);
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, lanes));
#pragma unroll
      for (int j = 0; j < MAX_SPLITS / 32; ++j) weights += weight_of(split_top[j], best) * split_total[j];
      weights = sum_lanes<32>(weights);
#pragma unroll
      for (int j = 0; j < MAX_SPLITS / 32; ++j) split_weight[g][lane + j * 32] = weight_of(split_top[j], best) / weights;
    }
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = threadIdx.x + e * WARPS * 32, g = i / HEAD_DIM, d = i % HEAD_DIM;
    if (g >= GROUP) break;
    float value = 0.f;
#pragma unroll
    for (int r = 0; r < AHEAD; ++r) value += split_weight[g][r] * early[e][r];   // beyond the last split both are 0
#pragma unroll 8
    for (int r = AHEAD; r < splits; ++r) value += split_weight[g][r] * __ldcg(partial + (r * GROUP + g) * STATE + d);
    out[i] = (u16)pack_bf16(value, 0.f);
  }
  if (threadIdx.x == 0) *arrivals = 0;
}
