// Computes: causal attention of packed prompts with a soft-cap (and a window): prefill on Hopper, heads of 128 or 256
// Shapes: query bf16 [T, heads, DIM]; keys, values bf16 [L, kv_heads, DIM]; out bf16 [T, heads DIM]; tiles int32 [n, 4]
// Runs: attention/varlen_hopper.py; grid [key heads, tiles], 128 rows a block: queries times heads of the key head
// Schedule: FlashAttention-3 (arXiv 2407.08608): a TMA producer warpgroup, two ping-pong wgmma consumers
// Invariants: scores lie within the cap, so exp(score) and sums stay in range; the sum is of weights rounded to bf16
//
// A thread block takes one key head and 128 rows: queries of one sequence, the heads that share the key head side by side. Since
// nothing is rescaled, the online softmax needs no maximum (FlashAttention-2's correction step is left out). Each consumer
// warpgroup has 64 rows. Their queries stay in registers, those of heads of 256 in part in shared memory. Keys and values come
// through tensor maps, 64 of them at a time, loaded by the producer.
//
// tanh and exp2 keep the special-function unit busy as long as both GEMMs keep the matrix units, with heads of 256 half as long.
// So a warpgroup multiplies the values of the keys before while it turns scores into weights, and one warpgroup does so while the
// other multiplies. Slots of shared memory hold keys or values, in the order of their use: keys 0, 1, values 0, keys 2, values 1
// ...
//
// launch.cuh, hopper.cuh and the generated wgmma_scores(), wgmma_more_scores() (queries in shared memory) and wgmma_values() stand
// before this file.

constexpr int ROWS = 128, KEYS = 64, DIM = HEAD_DIM, SLOTS = KEY_SLOTS;
constexpr int BOXES = DIM / 64, BOX_BYTES = KEYS * 128, SLOT_BYTES = BOXES * BOX_BYTES;   // a box: 64 columns
constexpr int CHUNKS = DIM / 8;                                                           // of 16 bytes, a row
constexpr int STEPS = DIM / 16, HELD = HELD_STEPS;                                        // of scores; with queries in registers
constexpr int WARPS = 8;                                                                  // consumers

struct Task {
  const u16* query;
  u16* out;
  const int4* tiles;                      // first row, queries, first key, index of the first query among its keys
  long long query_stride, out_stride;     // values from one row to the next
  int group, window;                      // query heads a key head; 0: no window
  float inverse_cap, scale;               // scale turns tanh into an exponent of 2
};

__device__ __forceinline__ float capped(float score, const Task& p) {
  float bent;
  asm("tanh.approx.f32 %0, %1;" : "=f"(bent) : "f"(score * p.inverse_cap));
  return bent * p.scale;
}

extern "C" __global__ void __launch_bounds__(384, 1)
    prefill_attention(const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values, const Task p) {
  extern __shared__ __align__(1024) u8 shared[];
  u8* const rows = shared + SLOTS * SLOT_BYTES;   // queries, then results
  u64* const full = reinterpret_cast<u64*>(rows + ROWS * DIM * 2);
  u64* const empty = full + SLOTS;
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; ++i) barrier_init(full + i, 1), barrier_init(empty + i, WARPS);
    barrier_init_fence();
  }
  __syncthreads();
  previous_kernels_done();
  next_kernel_may_start();

  const int head = blockIdx.x;
  const int4 tile = p.tiles[blockIdx.y];
  const int first_row = tile.x, count = tile.y, key_start = tile.z, offset = tile.w;
  const int last = offset + count;
  const int begin = p.window ? max(0, offset - p.window + 1) / KEYS * KEYS : 0;
  const int blocks = count ? (last - begin + KEYS - 1) / KEYS : 0;

  if (warpgroup == 0) {   // the producer: loads keys and values
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      int slot = 0;
      u32 phase = 1;
      auto load = [&](const TensorMap& from, int block) {
        barrier_wait(empty + slot, phase);
        barrier_expect_bytes(full + slot, SLOT_BYTES);
#pragma unroll
        for (int i = 0; i < BOXES; ++i) {
          tma_load(shared + slot * SLOT_BYTES + i * BOX_BYTES, from, head * DIM + i * 64, key_start + begin + block * KEYS, full + slot);
        }
        if (++slot == SLOTS) slot = 0, phase ^= 1;
      };
      if (blocks) load(keys, 0);
      for (int block = 1; block < blocks; ++block) load(keys, block), load(values, block - 1);
      if (blocks) load(values, blocks - 1);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  if (count == 0) return;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const int warp_row = warp * 16;   // of the tile

  // A warpgroup's 64 rows in shared memory as wgmma finds them, box after box of 64 columns.
  u8* const queries = rows + (warpgroup - 1) * 64 * DIM * 2;
  auto chunk_at = [&](int row, int chunk) {   // row of the tile, one of this warpgroup's
    return shared_address(queries) + chunk / 8 * (64 * 128) + row % 64 * 128 + (chunk % 8 ^ row % 8) * 16;
  };
#pragma unroll
  for (int i = 0; i < 16 * CHUNKS / 32; ++i) {
    const int row = warp_row + (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS, index = row / p.group;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (index < count) {
      const u16* const from = p.query + (first_row + index) * p.query_stride + (head * p.group + row % p.group) * DIM;
      v = *reinterpret_cast<const uint4*>(from + chunk * 8);
    }
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(chunk_at(row, chunk)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  }
  __syncwarp();
  u32 q[HELD][4];
#pragma unroll
  for (int i = 0; i < HELD; ++i) ldmatrix_x4(chunk_at(warp_row + lane % 16, i * 2 + lane / 16), q[i]);
  if constexpr (HELD < STEPS) {   // wgmma reads rows that other warps wrote
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warpgroup_sync(warpgroup);
  }

  // This thread's sums stand in rows lane / 4 and lane / 4 + 8 of its warp.
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) position[r] = offset + min((warp_row + lane / 4 + r * 8) / p.group, count - 1);
  const int first_position = offset + min(warp_row / p.group, count - 1), last_position = offset + min((warp_row + 15) / p.group, count - 1);

  float sum[DIM / 2], total[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < DIM / 2; ++i) sum[i] = 0.f;
  u32 weights[KEYS / 16][4];

  int slot = 0;
  u32 phase = 0;
  auto next_slot = [&] {   // the next one in use, filled
    const int next = slot;
    barrier_wait(full + next, phase);
    if (++slot == SLOTS) slot = 0, phase ^= 1;
    return next;
  };
  auto release = [&](int of) {
    if (lane == 0) barrier_arrive(empty + of);
  };
  float scores[KEYS / 2];
  auto issue_scores = [&](int of) {
    const u8* const from = shared + of * SLOT_BYTES;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const u64 key = wgmma_descriptor(from + i / 4 * BOX_BYTES) + i % 4 * 2;
      if (i < HELD) {
        wgmma_scores(scores, q[i < HELD ? i : 0], key, i > 0);
      } else {
        wgmma_more_scores(scores, wgmma_descriptor(queries + i / 4 * (64 * 128)) + i % 4 * 2, key, i > 0);
      }
    }
    wgmma_commit();
  };
  auto issue_values = [&](int of) {
    const u64 from = wgmma_descriptor(shared + of * SLOT_BYTES, BOX_BYTES);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) wgmma_values(sum, weights[i], from + i * (16 * 128 / 16), true);
    wgmma_commit();
  };
  // Behind the last key stands the next sequence, or what a block of the cache held before. It weighs nothing, but 0 times NaN
  // would be NaN: of the last block's values rows from `real` on become zeros. Both warpgroups write the same ones.
  auto clear_from = [&](int of, int real) {
    const int words = (KEYS - real) * 8;   // of 16 bytes in a box, whose rows are whole in each order of chunks
    if (words == 0) return;
    for (int i = threadIdx.x % 128; i < BOXES * words; i += 128) {
      const u32 at = shared_address(shared + of * SLOT_BYTES + i / words * BOX_BYTES + real * 128) + i % words * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warpgroup_sync(warpgroup);
  };
  auto weigh = [&](int at) {
    if (at + KEYS - 1 <= first_position && (p.window == 0 || at > last_position - p.window)) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) scores[i] = exp2_approx(capped(scores[i], p));
    } else {
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        const int index = at + i / 4 * 8 + lane % 4 * 2 + i % 2, own = position[i / 2 % 2];
        const bool seen = index <= own && (p.window == 0 || index > own - p.window);
        scores[i] = seen ? exp2_approx(capped(scores[i], p)) : 0.f;
      }
    }
  };
  auto round = [&] {
    // What the values are weighed with is what is summed: a row that looks at one key gets that key's value.
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 pair = pack_bf16(scores[i * 8 + j * 2], scores[i * 8 + j * 2 + 1]);
        total[j % 2] += low_bf16(pair) + high_bf16(pair);
        weights[i][j] = pair;
      }
    }
  };
  int now = next_slot();
  issue_scores(now);
  wgmma_wait<0>();
  warpgroup_fence_operand(scores);
  release(now);
  weigh(begin);
  round();
  for (int at = begin + KEYS; at < last; at += KEYS) {
    now = next_slot();
    issue_scores(now);
    const int before = next_slot();
    issue_values(before);
    wgmma_wait<1>();
    warpgroup_fence_operand(scores);
    release(now);
    weigh(at);
    wgmma_wait<0>();
    warpgroup_fence_operand(sum);
    release(before);
    round();
  }
  now = next_slot();
  clear_from(now, last - begin - (blocks - 1) * KEYS);
  issue_values(now);
  wgmma_wait<0>();
  warpgroup_fence_operand(sum);

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    total[r] = 1.f / total[r];
  }
  if constexpr (HELD < STEPS) warpgroup_sync(warpgroup);   // nobody's queries are read any more
#pragma unroll
  for (int j = 0; j < CHUNKS; j += 2) {
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack_bf16(sum[j * 4 + i * 2] * total[i % 2], sum[j * 4 + i * 2 + 1] * total[i % 2]);
    stmatrix_x4(chunk_at(warp_row + lane % 16, j + lane / 16), pairs);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * CHUNKS / 32; ++i) {
    const int row = warp_row + (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS, index = row / p.group;
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(chunk_at(row, chunk)) : "memory");
    if (index < count) {
      u16* const to = p.out + (first_row + index) * p.out_stride + (head * p.group + row % p.group) * DIM;
      *reinterpret_cast<uint4*>(to + chunk * 8) = v;
    }
  }
}
