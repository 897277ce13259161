// Computes: y[m, n] = sum over k of x[m, k] * W[n, k], W dequantized in registers (fused GEMM), for 9 to 1,792 rows
// Shapes: x bf16 in the layout of layout.cuh; W packed [n, k]; y bf16 or fp32 [m, n]; tiles of 64 WARPGROUPS x ROWS
// Runs: four_bit_gemm and int8_gemm, launched by linear/gemm.py on Hopper; at most one thread block an SM
// Schedule: persistent Stream-K (arXiv 2301.03598); producer/consumer warpgroups, wgmma, TMA (as in CUTLASS 3)
// Invariants: sums in a fixed order, whatever the timing; p.arrivals is zero between launches; W is not stored in bf16
//
// W is wgmma's operand in registers (64 rows a warpgroup), so each weight is dequantized once for ROWS rows of x and never stored.
// x is the operand in shared memory. A tile is WARPGROUPS * 64 rows of W by ROWS rows of x. Tiles are split along k into units of
// four blocks of 64 columns. All units of all tiles, in order, are split evenly and contiguously over the thread blocks
// (Stream-K).
//
// Fix-up: a tile that several thread blocks share is summed at the end in the order of k. Each of them adds up an equal share of
// the tile. They wait for each other, but not for long. Where another kernel keeps some of them from running, those that waited
// MAX_WAIT clocks leave their share to those that see all of them arrive, and make room. The grid is at most one thread block an
// SM, so this is the exception.
//
// Packed W has the columns of a block of 64 in the order that 16-byte reads give: lane quad q of matrix instruction i multiplies
// columns 16 q + 4 i ... + 3. x comes in that order (layout.cuh) and in the form that wgmma reads, so the TMA unit fetches it
// without passing through registers. Four producer warps issue these loads: a warp that multiplies as well would hold up its
// whole warpgroup each time. Where the operand says so (Operand::PRODUCED), producer warp i also loads W for consumer warpgroup
// i, a stage of its four tiles at a time, and writes the scales in fp32 beside the codes. Otherwise W comes through a ring of
// asynchronous copies per consumer warp, as in gemv.cuh.
//
// p.arrivals of a tile's first thread block counts three things: those that have arrived, in its low bits; those that are done;
// and those that left their share, in its high bits. From FLAGS on there is a flag for each share that was left. All are zero
// between launches.
//
// Of struct Problem, x is in the layout of layout.cuh, x_stride the bytes of one block of 64 columns of it, tiles counts 16 rows
// of W each, k_blocks the units of a tile, slice_k_blocks the tiles along m. launch.cuh, hopper.cuh, gemv.cuh, the format's GEMV
// file and the generated wgmma() stand before this file; `struct Operand` after it.

constexpr int ROWS = GEMM_ROWS, WARPGROUPS = GEMM_WARPGROUPS, W_STAGES = GEMM_W_STAGES, X_UNITS = GEMM_X_UNITS;
constexpr int WARPS = WARPGROUPS * 4, THREADS = WARPS * 32;   // consumers; one warpgroup more are producers
constexpr int GROUPS = ROWS / 8;                    // of eight rows of x
constexpr int BLOCKS = 4, BLOCK_BYTES = ROWS * 128; // of a unit; of x in a block of 64 columns
constexpr int CHUNK = ROWS <= 64 ? BLOCKS : 1;      // blocks of x that one mbarrier waits for, one from each producer warp
constexpr int SLOTS = BLOCKS * X_UNITS / CHUNK, CHUNK_BYTES = CHUNK * BLOCK_BYTES;
constexpr bool DOUBLE_BUFFER = GEMM_DOUBLE_BUFFER;        // registers for two dequantized blocks
constexpr bool X_FIRST = ROWS <= 32;                // x is loaded before scales are stored: units are short there (measured)
constexpr long long MAX_WAIT = GEMM_MAX_WAIT;
constexpr u32 DONE = 1u << 11, LEFT = 1u << 22, FLAGS = 2048;

// setmaxnreg moves registers from the producer warps to the consumers.
static_assert(WARPGROUPS <= 4, "one producer warp a consumer warpgroup");
constexpr int LAUNCH_REGISTERS = 65536 / (THREADS + 128) / 8 * 8, PRODUCER_REGISTERS = 32;
constexpr int CONSUMER_REGISTERS = (LAUNCH_REGISTERS * (WARPGROUPS + 1) - PRODUCER_REGISTERS) / WARPGROUPS / 8 * 8;
// All consumer warps.
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
// Zeros where not `wanted`. There is no branch, so that many loads are in flight.
__device__ __forceinline__ float4 read_if(bool wanted, const float4* from) {
  float4 v;
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %4, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
               "@wanted ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%5];\n}"
               : "=&f"(v.x), "=&f"(v.y), "=&f"(v.z), "=&f"(v.w)
               : "r"((u32)wanted), "l"(from)
               : "memory");
  return v;
}

// A matrix of ROWS x 16 in shared memory without swizzle: 8 x 8 cores of 128 bytes, 128 bytes apart along k, 1024 along the rows.
__device__ __forceinline__ u64 x_descriptor(const u8* at) {
  return (u64)((shared_address(at) & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(1024 >> 4) << 32;
}

// A producer warp's work for its consumer warpgroup: `count` units of W from `cursor` on, their codes by TMA, their
// scales by its lanes, and its part of x. W is loaded before x, which the kernel before may still be writing. A lane
// has an eighth of the scales of tile lane.id / 8 of the four; their bytes are read two units ahead.
template <class Operand, class Format, class Cursor, class Advance, class LoadX>
__device__ __forceinline__ void produce(const Format& format, int tiles, const u8* codebook, u8* ring, u64* full, u64* empty, const Lane& lane,
                                        int count, Cursor cursor, Advance advance, LoadX load_x) {
  constexpr int GROUP_CODES = 4 * Format::CODE_BYTES, GROUP_STAGE = 4 * Operand::STAGE_BYTES;
  if (lane.id == 0) {
    for (int i = 0; i < W_STAGES; ++i) barrier_init(full + i, 1), barrier_init(empty + i, 4);
    barrier_init_fence();
  }
  __syncwarp();
  typename Operand::Scales scales;
  Cursor ahead = cursor;   // by a unit
  auto lane_tile = [&](const Cursor& at) { return min(at.tile + lane.id / 8, tiles - 1); };
  scales.prefetch(format, lane, lane_tile(ahead), ahead.k_block);
  advance(ahead);
  scales.prefetch(format, lane, lane_tile(ahead), ahead.k_block);
  scales.read_groups(format, lane, lane_tile(cursor), cursor.k_block);
  auto fetch = [&](int slot, const Cursor& from) {
    if (lane.id == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tma_bulk_load(ring + slot * GROUP_STAGE + i * Format::CODE_BYTES, format.codes_of(min(from.tile + i, tiles - 1), from.k_block),
                  Format::CODE_BYTES, full + slot);
      }
    }
  };
  float2 expanded[BLOCKS];
  auto expand = [&] {   // what was read; the next place is prefetched
    scales.expand(codebook, expanded);
    cursor = ahead;
    advance(ahead);
    scales.prefetch(format, lane, lane_tile(ahead), ahead.k_block);
    scales.read_groups(format, lane, lane_tile(cursor), cursor.k_block);
  };
  auto store = [&](int slot) {
    float2* const to = reinterpret_cast<float2*>(ring + slot * GROUP_STAGE + GROUP_CODES) + lane.id;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) to[b * 32] = expanded[b];
    __syncwarp();
    if (lane.id == 0) barrier_expect_bytes(full + slot, GROUP_CODES);   // the stage's one arrival
  };
  const int first = min(count, W_STAGES);
  Cursor early = cursor;
  for (int i = 0; i < first; ++i) fetch(i, early), advance(early);
  __syncthreads();   // the codebook is there
#pragma unroll 1
  for (int i = 0; i < first; ++i) expand(), store(i);
  previous_kernels_done();
  int x_left = count;
#pragma unroll 1
  for (int i = 0; i < X_UNITS && x_left > 0; ++i, --x_left) load_x();
  int slot = 0;
  u32 phase = 0;
#pragma unroll 1
  for (int i = W_STAGES; i < count; ++i) {   // W(i) and x(i - W_STAGES + X_UNITS) wait for the same unit to be done
    const Cursor from = cursor;
    expand();
    barrier_wait(empty + slot, phase);
    fetch(slot, from);
    const bool loads_x = x_left > 0;
    if (X_FIRST && loads_x) load_x();
    store(slot);
    if (!X_FIRST && loads_x) load_x();
    x_left -= loads_x;
    if (++slot == W_STAGES) slot = 0, phase ^= 1;
  }
#pragma unroll 1
  for (; x_left > 0; --x_left) load_x();
  // Consumers dequantize a block ahead, also at the end: a stage of anything.
  if (count < W_STAGES) slot = count;
  else barrier_wait(empty + slot, phase);
  if (lane.id == 0) barrier_arrive(full + slot);
}

template <class Operand, class Format>
__device__ __forceinline__ void gemm(const Problem& p, const Format& format) {
  constexpr int STAGE_BLOCKS = Format::K_BLOCK / 64, UNIT_STAGES = BLOCKS / STAGE_BLOCKS;
  constexpr bool PRODUCED = Operand::PRODUCED;   // W, by the producer warps
  constexpr int WARP_STAGE = Operand::STAGE_BYTES, GROUP_STAGE = 4 * WARP_STAGE;
  extern __shared__ __align__(128) u8 shared[];
  __shared__ bool adds_own_share[2], others_left[2];   // of the two tiles that this thread block can share
  u8* const codebook = shared;
  u8* const xs = codebook + Format::CODEBOOK_BYTES;
  u8* const ring_start = xs + SLOTS * CHUNK_BYTES;
  u64* const full = reinterpret_cast<u64*>(ring_start + WARPS * W_STAGES * WARP_STAGE);
  u64* const empty = full + SLOTS;
  u64* const w_full = empty + SLOTS;   // of each warpgroup's stages
  u64* const w_empty = w_full + WARPGROUPS * W_STAGES;

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);   // so that the compiler knows it is one of the whole warp
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  const int units = p.k_blocks, m_tiles = p.slice_k_blocks, w_k_blocks = units * UNIT_STAGES;
  const int w_tiles = (p.tiles + WARPS - 1) / WARPS;
  const u32 all_units = (u32)w_tiles * m_tiles * units;
  const u32 begin = split_begin(blockIdx.x, all_units, gridDim.x), end = split_begin(blockIdx.x + 1, all_units, gridDim.x);
  int unit = begin % units, w_tile = begin / units / m_tiles, m_tile = begin / units % m_tiles;
  // A thread block can share a tile with those before it and another with those after it.
  const int first_tile = begin / units, last_tile = (end - 1) / units;
  auto is_shared = [&](int tile) { return (u32)tile * units < begin || (u32)(tile + 1) * units > end; };
  const bool two = first_tile < last_tile && is_shared(first_tile) && is_shared(last_tile);

  next_kernel_may_start();
  if (threadIdx.x == THREADS) {
    for (int i = 0; i < SLOTS; ++i) barrier_init(full + i, CHUNK), barrier_init(empty + i, WARPS);
    barrier_init_fence();
  }
  // Walks through W, stage after stage. Rows past n may be any: they are not stored.
  struct Cursor {
    int tile, m, k_block;
  };
  auto advance = [&](Cursor& cursor) {
    if (++cursor.k_block < w_k_blocks) return;
    cursor.k_block = 0;
    if (++cursor.m == m_tiles) cursor.m = 0, cursor.tile += WARPS;
  };
  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    const int own = warp - WARPS;   // block of each unit of x, and warpgroup whose W this warp produces
    int x_slot = CHUNK == BLOCKS ? 0 : own;
    u32 x_phase = 1;
    // All lanes wait and count, so that the compiler sees what is the same for all of them; one loads.
    auto load_x = [&] {
      barrier_wait(empty + x_slot, x_phase);
      if (lane.id == 0) {
        barrier_expect_bytes(full + x_slot, BLOCK_BYTES);
        tma_bulk_load(xs + x_slot * CHUNK_BYTES + own % CHUNK * BLOCK_BYTES,
                  p.x + (size_t)(unit * BLOCKS + own) * p.x_stride + m_tile * BLOCK_BYTES, BLOCK_BYTES, full + x_slot);
      }
      x_slot += BLOCKS / CHUNK;
      if (x_slot >= SLOTS) x_slot -= SLOTS, x_phase ^= 1;
      if (++unit == units) {
        unit = 0;
        if (++m_tile == m_tiles) m_tile = 0;
      }
    };
    const int count = end - begin;
    if (PRODUCED && own < WARPGROUPS) {
      if constexpr (PRODUCED) {
        const Cursor cursor = {(w_tile * WARPGROUPS + own) * 4, m_tile, unit};
        produce<Operand>(format, p.tiles, codebook, ring_start + own * W_STAGES * GROUP_STAGE, w_full + own * W_STAGES, w_empty + own * W_STAGES,
                         lane, count, cursor, advance, load_x);
      }
    } else {
      __syncthreads();
      previous_kernels_done();
      for (int left = count; left > 0; --left) load_x();
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));

  u8* const ring = PRODUCED ? ring_start + warp / 4 * W_STAGES * GROUP_STAGE : ring_start + warp * W_STAGES * WARP_STAGE;
  u8* const ring_end = ring + W_STAGES * (PRODUCED ? GROUP_STAGE : WARP_STAGE);
  Cursor load = {w_tile * WARPS + warp, m_tile, unit * UNIT_STAGES}, ahead = load;
  int to_load = (end - begin) * UNIT_STAGES;
  auto load_one = [&](u8* stage) {
    if constexpr (!PRODUCED) {
      if (to_load > 0) {
        format.load(stage, lane, min(load.tile, p.tiles - 1), load.k_block);
        --to_load;
        advance(load);
      }
      cp_async_commit();
    }
  };
#pragma unroll
  for (int i = 0; i < W_STAGES; ++i) load_one(ring + i * WARP_STAGE);
  Operand::fill_codebook(format, codebook, THREADS);
  auto read_scale = [&] { return format.scale(lane, min(ahead.tile, p.tiles - 1), ahead.k_block); };
  typename Format::Scale group_scale;
  if constexpr (!PRODUCED) group_scale = read_scale();
  __syncthreads();
  previous_kernels_done();

  // W is dequantized while wgmma multiplies the block before: with DOUBLE_BUFFER into the other half of `a`, else the operands of two
  // instructions while the other two run.
  u32 a[DOUBLE_BUFFER + 1][16];
  u8* stage = ring;
  u64* stage_full = w_full + warp / 4 * W_STAGES;
  u32 stage_phase = 0;
  float2 scales, block_scales;   // without producers of the lane's own block
  auto next_codes = [&](int kb) {
    const int b = kb % STAGE_BLOCKS;
    if (b == 0) {
      if constexpr (PRODUCED) {
        barrier_wait(stage_full, stage_phase);
      } else {
        cp_async_wait<W_STAGES - 1>();
        __syncwarp();
        scales = Operand::scales(format, stage, lane, group_scale, codebook);
        advance(ahead);
        group_scale = read_scale();
      }
    }
    const Operand codes(stage + (PRODUCED ? warp % 4 * Operand::CODE_BYTES : 0), lane, b);
    if constexpr (PRODUCED) block_scales = Operand::of_block(stage, warp % 4, lane, b);
    else block_scales = Operand::of_block(scales, lane, b);
    if (b == STAGE_BLOCKS - 1) {
      __syncwarp();
      if constexpr (PRODUCED) {
        if (lane.id == 0) barrier_arrive(stage_full + (w_empty - w_full));
        ++stage_full;
      } else {
        load_one(stage);
      }
      stage += PRODUCED ? GROUP_STAGE : WARP_STAGE;
      if (stage == ring_end) {
        stage = ring;
        if constexpr (PRODUCED) stage_full -= W_STAGES, stage_phase ^= 1;
      }
    }
    return codes;
  };
  auto dequantize = [&](const Operand& codes, int first, int last, u32* to) {
#pragma unroll
    for (int i = first; i < last; ++i) codes.dequantize(i, block_scales, codebook, lane, to + i * 4);
  };
  Operand codes = next_codes(0);
  dequantize(codes, 0, DOUBLE_BUFFER || Operand::SCALED_AFTER ? 4 : 2, a[0]);

  const u64 x_first = x_descriptor(xs);
  int slot = 0;   // of the unit's first block
  u32 phase = 0;
  auto release = [&](int of) {
    if (lane.id == 0) barrier_arrive(empty + of);
  };
  for (u32 left = end - begin; left > 0;) {
    const int first_unit = unit, end_unit = min(units, unit + (int)left);
    left -= end_unit - unit;
    float sum[ROWS / 2];
    if constexpr (Operand::SCALED_AFTER) {
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) sum[i] = 0.f;
    }
    for (; unit < end_unit; ++unit) {
      const u64 x_unit = x_first + slot * (CHUNK_BYTES / 16);
#pragma unroll
      for (int kb = 0; kb < BLOCKS; ++kb) {
        u32* const now = a[DOUBLE_BUFFER ? kb % 2 : 0];
        u32* const next = a[DOUBLE_BUFFER ? 1 - kb % 2 : 0];
        if (kb % CHUNK == 0) barrier_wait(full + slot + kb / CHUNK, phase);
        const u64 x = x_unit + kb * (BLOCK_BYTES / 16);
        const float2 scale = block_scales;
        if constexpr (Operand::SCALED_AFTER) {
          float block_sums[ROWS / 2];
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            wgmma(block_sums, now + i * 4, x + i * 16, i > 0);
            if (!DOUBLE_BUFFER && i == 1) wgmma_commit();
          }
          wgmma_commit();
          codes = next_codes((kb + 1) % BLOCKS);
          if constexpr (!DOUBLE_BUFFER) wgmma_wait<1>();
          dequantize(codes, 0, DOUBLE_BUFFER ? 4 : 2, next);
          wgmma_wait<0>();
          warpgroup_fence_operand(block_sums);
          if (kb % CHUNK == CHUNK - 1) release(slot + kb / CHUNK);
#pragma unroll
          for (int i = 0; i < ROWS / 2; ++i) sum[i] += block_sums[i] * (i & 2 ? scale.y : scale.x);
          if constexpr (!DOUBLE_BUFFER) dequantize(codes, 2, 4, next);
        } else {
          const int before = kb > 0 ? slot + kb / CHUNK - 1 : (slot == 0 ? SLOTS : slot) - 1;
          const bool chunk_before = kb % CHUNK == 0 && (kb > 0 || unit > first_unit);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < (DOUBLE_BUFFER ? 4 : 2); ++i) wgmma(sum, now + i * 4, x + i * 16, unit > first_unit || kb > 0 || i > 0);
          wgmma_commit();
          if constexpr (!DOUBLE_BUFFER) {
            wgmma_wait<1>();
            if (chunk_before) release(before);
            dequantize(codes, 2, 4, now);
            wgmma_fence();
#pragma unroll
            for (int i = 2; i < 4; ++i) wgmma(sum, now + i * 4, x + i * 16, true);
            wgmma_commit();
          }
          codes = next_codes((kb + 1) % BLOCKS);
          wgmma_wait<1>();
          if (DOUBLE_BUFFER && chunk_before) release(before);
          dequantize(codes, 0, DOUBLE_BUFFER ? 4 : 2, next);
        }
      }
      slot += BLOCKS / CHUNK;
      if (slot == SLOTS) slot = 0, phase ^= 1;
    }
    if constexpr (!Operand::SCALED_AFTER) {
      wgmma_wait<0>();
      warpgroup_fence_operand(sum);
      release((slot == 0 ? SLOTS : slot) - 1);
    }

    if (first_unit == 0 && unit == units) {
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) {
        const int row = (w_tile * WARPS + warp) * TILE + lane.group + (i & 2) * 4;
        const int column = m_tile * ROWS + i / 4 * 8 + lane.quad * 2 + (i & 1);
        if (row < p.n && column < p.m) store_output(p, row, column, format.epilogue(row, sum[i]));
      }
    } else {
      const u32 from = (u32)(w_tile * m_tiles + m_tile) * units;
      const int slot_index = blockIdx.x * 2 + (begin < from);
      float4* const to = reinterpret_cast<float4*>(p.partial) + (size_t)slot_index * GROUPS * THREADS + threadIdx.x;
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) __stcg(to + j * THREADS, make_float4(sum[j * 4], sum[j * 4 + 1], sum[j * 4 + 2], sum[j * 4 + 3]));
      consumers_sync();
      if (threadIdx.x == (two && begin < from ? THREADS / 2 : 0)) {   // this thread waits for the others: it must see its own
        // One release for all: the barrier puts every thread's stores before it.
        u32* const counter = p.arrivals + split_owner(from, all_units, gridDim.x);
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      }
    }
    unit = 0;
    if (++m_tile == m_tiles) m_tile = 0, ++w_tile;
  }
  if constexpr (!PRODUCED) cp_async_wait<0>();

  // The fix-up of shared tiles. Where there are two, half of the warps see to each. A small GEMM spends half of its time here, so
  // loads are issued as early as they can be.
  const int team = two && warp >= WARPS / 2, team_threads = two ? THREADS / 2 : THREADS, member = threadIdx.x - team * (THREADS / 2);
  const int tile = team == 1 || !is_shared(first_tile) ? last_tile : first_tile;
  if (!is_shared(tile)) return;
  auto team_sync = [&] { asm volatile("bar.sync %0, %1;" ::"r"(2 + team), "r"(team_threads) : "memory"); };
  const u32 from = (u32)tile * units;
  const int first = split_owner(from, all_units, gridDim.x), last = split_owner(from + units - 1, all_units, gridDim.x);
  const u32 sharers = last - first + 1;
  u32* const counter = p.arrivals + first;
  auto slot_of = [&](int c) { return c * 2 + (split_begin(c, all_units, gridDim.x) < from); };
  auto clean_up = [&](u32 count, u32 how) {   // the last to be done; `count` is what it found
    if (count / DONE % DONE != sharers - 1) return;
    for (int c = first; count + how >= LEFT && c <= last; ++c) p.arrivals[FLAGS + slot_of(c)] = 0;
    *counter = 0;
  };
  bool is_done = false;
  if (member == 0) {
    const long long give_up = clock64() + MAX_WAIT;
    u32 count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    } while (count % DONE < sharers && clock64() < give_up);
    adds_own_share[team] = true, others_left[team] = count >= LEFT;
    if (count % DONE < sharers) {
      p.arrivals[FLAGS + slot_of(blockIdx.x)] = 1;
      __threadfence();
      is_done = true, others_left[team] = false;
      count = atomicAdd(counter, DONE + LEFT);
      clean_up(count, DONE + LEFT);
      adds_own_share[team] = count % DONE == sharers;   // all arrived after all
      __threadfence();
    }
  }
  team_sync();
  constexpr u32 VALUES = GROUPS * THREADS, TOGETHER = GROUPS < 4 ? 2 : 4;   // of four sums
  constexpr int PARTIALS = WARPGROUPS == 4 ? 3 : 6;                            // partial tiles whose loads are in flight together
  const float4* const partials = reinterpret_cast<const float4*>(p.partial);
  auto add_share = [&](u32 share) {
    const u32 to = VALUES * (share + 1) / sharers;
    for (u32 begin_at = VALUES * share / sharers + member - lane.id; begin_at < to; begin_at += team_threads * TOGETHER) {   // whole warps
      const u32 at = begin_at + lane.id;
      float total[TOGETHER][4] = {};
      for (int c = first; c <= last; c += PARTIALS) {
        const int slot_index = slot_of(min(c + lane.id % 8, last));   // one division for all
        const float4* from_part[PARTIALS];
        float4 v[PARTIALS][TOGETHER];
#pragma unroll
        for (int i = 0; i < PARTIALS; ++i) from_part[i] = partials + (size_t)__shfl_sync(0xffffffffu, slot_index, i) * VALUES + at;
#pragma unroll
        for (int i = 0; i < PARTIALS; ++i) {
#pragma unroll
          for (int j = 0; j < TOGETHER; ++j) {
            v[i][j] = read_if(c + i <= last && at + j * team_threads < to, from_part[i] + j * team_threads);
          }
        }
#pragma unroll
        for (int i = 0; i < PARTIALS; ++i) {
#pragma unroll
          for (int j = 0; j < TOGETHER; ++j) {
            const float4& w = v[i][j];
            total[j][0] += w.x, total[j][1] += w.y, total[j][2] += w.z, total[j][3] += w.w;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < TOGETHER; ++j) {
        const u32 i = at + j * team_threads;
        const int thread = i % THREADS;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = (tile / m_tiles * WARPS + thread / 32) * TILE + thread % 32 / 4 + (c & 2) * 4;
          const int column = tile % m_tiles * ROWS + i / THREADS * 8 + thread % 4 * 2 + (c & 1);
          if (i < to && row < p.n && column < p.m) store_output(p, row, column, format.epilogue(row, total[j][c]));
        }
      }
    }
  };
  // Its own share, and those that were left: all who see these add up the same values. One loop, so that the code is there
  // once. Where none was left nobody reads the counter again, and its answer comes while the share is added up.
  const bool more = others_left[team];
  u32 count = 0;
  if (member == 0 && !is_done && !more) count = atomicAdd(counter, DONE);
  for (int c = more ? first : (int)blockIdx.x; c <= (more ? last : (int)blockIdx.x); ++c) {
    if (c == blockIdx.x ? adds_own_share[team] : __ldcg(p.arrivals + FLAGS + slot_of(c)) != 0) add_share(c - first);
  }
  if (more) team_sync();   // every thread has read the flags
  if (member == 0 && !is_done) {
    if (more) count = atomicAdd(counter, DONE);
    clean_up(count, DONE);
  }
}
