// y[m, n] = sum over k of x[m, k] * W[n, k] for more than a few rows of x, W packed: Hopper's warpgroup matrix instructions.
//
// W is the side that these take from registers (64 rows a warpgroup), so each weight is decoded once for ROWS rows of x and
// no decoded weight is ever stored. x is the side in shared memory. A tile is WARPGROUPS * 64 rows of W by ROWS rows of x;
// tiles are cut along k into units of four blocks of 64 columns, and all units of all tiles, in order, are dealt out to the
// thread blocks in equal contiguous runs. A tile that several thread blocks share is summed at the end in the order of k, each
// of them adding up an equal part of it: the same sum whatever the timing. They wait for each other, but not for long: where
// another kernel keeps some of them from running, those that waited PATIENCE clocks leave their parts to those that see all
// of them come, and make room. The grid is at most one thread block a processor, so that this is the exception.
//
// W comes through a ring of asynchronous copies per warp, as in matvec.cuh. Packed W has the columns of a block of 64 in the
// order that 16-byte reads give: lane quad q of matrix instruction i multiplies columns 16 q + 4 i ... + 3. x comes in that
// order (ordered.cuh) and in the form that wgmma reads, so that the bulk copy engine fetches it without passing through
// registers. One warpgroup does nothing but ask for it: whoever multiplies as well holds up its whole warpgroup each time.
//
// p.arrivals of a tile's first thread block counts those that have come, in its low bits, those that are done, and those that
// left their parts, in its high ones; from FLAGS on there is a flag for each such part. All are zero between launches.
//
// Of struct Problem, x is the ordered x, x_stride the bytes of one block of 64 columns of it, tiles counts 16 rows of W each,
// steps the units of a tile, slice_steps the tiles along m. launch.cuh, hopper.cuh, matvec.cuh, the format's matvec file and the
// generated wgmma() stand before this file; `struct Operand` after it.

constexpr int ROWS = GEMM_ROWS, WARPGROUPS = GEMM_WARPGROUPS, W_STAGES = GEMM_W_STAGES, X_UNITS = GEMM_X_UNITS;
constexpr int WARPS = WARPGROUPS * 4, THREADS = WARPS * 32;   // that multiply; one warpgroup more asks for x
constexpr int GROUPS = ROWS / 8;                    // of eight rows of x
constexpr int BLOCKS = 4, BLOCK_BYTES = ROWS * 128; // of a unit; of x in a block of 64 columns
constexpr int CHUNK = ROWS <= 64 ? BLOCKS : 1;      // blocks of x that arrive together
constexpr int SLOTS = BLOCKS * X_UNITS / CHUNK, CHUNK_BYTES = CHUNK * BLOCK_BYTES;
constexpr bool TWO_HALVES = GEMM_TWO_HALVES;        // registers for two decoded blocks
constexpr long long PATIENCE = GEMM_PATIENCE;
constexpr u32 DONE = 1u << 11, LEFT = 1u << 22, FLAGS = 2048;

// Registers move between warpgroups: those that multiply get what the one that asks for x leaves.
constexpr int ASKING_REGISTERS = 24, MULTIPLYING_REGISTERS = WARPGROUPS == 4 ? 112 : 240;
// All warps that multiply.
__device__ __forceinline__ void multipliers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
// Zeros where not `wanted`; without a branch, so that many are in flight.
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

template <class Operand, class Format>
__device__ __forceinline__ void gemm(const Problem& p, const Format& format) {
  constexpr int STAGE_BLOCKS = Format::STEP / 64, UNIT_STAGES = BLOCKS / STAGE_BLOCKS;
  extern __shared__ __align__(128) u8 shared[];
  __shared__ bool adds_part[2], others_left[2];   // of the two tiles this thread block can share
  u8* const tables = shared;
  u8* const xs = tables + Format::TABLE_BYTES;
  u8* const ring_all = xs + SLOTS * CHUNK_BYTES;
  u64* const full = reinterpret_cast<u64*>(ring_all + WARPS * W_STAGES * Format::STAGE_BYTES);
  u64* const empty = full + SLOTS;

  const int warp = threadIdx.x / 32;
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  const int units = p.steps, m_tiles = p.slice_steps, w_steps = units * UNIT_STAGES;
  const int w_tiles = (p.tiles + WARPS - 1) / WARPS;
  const u32 all_units = (u32)w_tiles * m_tiles * units;
  const u32 begin = run_begin(blockIdx.x, all_units, gridDim.x), end = run_begin(blockIdx.x + 1, all_units, gridDim.x);
  int unit = begin % units, w_tile = begin / units / m_tiles, m_tile = begin / units % m_tiles;
  // A thread block can share a tile with those before it and another with those after it.
  const int first_tile = begin / units, last_tile = (end - 1) / units;
  auto is_shared = [&](int tile) { return (u32)tile * units < begin || (u32)(tile + 1) * units > end; };
  const bool two = first_tile < last_tile && is_shared(first_tile) && is_shared(last_tile);

  next_kernel_may_start();
  if (threadIdx.x == THREADS) {
    for (int i = 0; i < SLOTS; ++i) barrier_init(full + i, 1), barrier_init(empty + i, WARPS);
    barriers_ready();
  }
  if (warp >= WARPS) {   // ask for x
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(ASKING_REGISTERS));
    __syncthreads();
    if (threadIdx.x != THREADS) return;
    previous_kernels_done();
    int slot = 0;
    u32 phase = 1;
    for (u32 left = end - begin; left > 0; --left) {
      const u8* from = p.x + (size_t)unit * BLOCKS * p.x_stride + m_tile * BLOCK_BYTES;
      for (int block = 0; block < BLOCKS; ++block, from += p.x_stride) {
        if (block % CHUNK == 0) {
          barrier_wait(empty + slot, phase);
          barrier_expect(full + slot, CHUNK_BYTES);
        }
        bulk_copy(xs + slot * CHUNK_BYTES + block % CHUNK * BLOCK_BYTES, from, BLOCK_BYTES, full + slot);
        if (block % CHUNK == CHUNK - 1 && ++slot == SLOTS) slot = 0, phase ^= 1;
      }
      if (++unit == units) {
        unit = 0;
        if (++m_tile == m_tiles) m_tile = 0;
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING_REGISTERS));

  u8* const ring = ring_all + warp * W_STAGES * Format::STAGE_BYTES;
  u8* const ring_end = ring + W_STAGES * Format::STAGE_BYTES;
  // A place in W, stage after stage; rows past n: any, they are not stored.
  struct Place {
    int tile, m, step;
  };
  auto advance = [&](Place& place) {
    if (++place.step < w_steps) return;
    place.step = 0;
    if (++place.m == m_tiles) place.m = 0, place.tile = min(place.tile + WARPS, p.tiles - 1);
  };
  Place load = {min(w_tile * WARPS + warp, p.tiles - 1), m_tile, unit * UNIT_STAGES}, ahead = load;
  int to_load = (end - begin) * UNIT_STAGES;
  auto load_one = [&](u8* stage) {
    if (to_load > 0) {
      format.load(stage, lane, load.tile, load.step);
      --to_load;
      advance(load);
    }
    copies_close();
  };
#pragma unroll
  for (int i = 0; i < W_STAGES; ++i) load_one(ring + i * Format::STAGE_BYTES);
  Operand::fill_tables(format, tables, THREADS);
  typename Format::Scale group_scale = format.scale(lane, ahead.tile, ahead.step);
  __syncthreads();
  previous_kernels_done();

  // W is decoded while the products of the block before are computed: with TWO_HALVES into the other half of `a`, else two
  // instructions' operands while the other two run.
  u32 a[TWO_HALVES + 1][16];
  u8* stage = ring;
  float2 scales = make_float2(0.f, 0.f), block_scales;
  auto next_codes = [&](int kb) {
    const int b = kb % STAGE_BLOCKS;
    if (b == 0) {
      copies_wait<W_STAGES - 1>();
      __syncwarp();
      scales = Operand::scales(format, stage, lane, group_scale, tables);
      advance(ahead);
      group_scale = format.scale(lane, ahead.tile, ahead.step);
    }
    const Operand codes(stage, lane, b);
    block_scales = Operand::of_block(scales, lane, b);
    if (b == STAGE_BLOCKS - 1) {
      __syncwarp();
      load_one(stage);
      stage += Format::STAGE_BYTES;
      if (stage == ring_end) stage = ring;
    }
    return codes;
  };
  auto decode = [&](const Operand& codes, int first, int last, u32* to) {
#pragma unroll
    for (int i = first; i < last; ++i) codes.decode(i, block_scales, tables, lane, to + i * 4);
  };
  Operand codes = next_codes(0);
  decode(codes, 0, TWO_HALVES || Operand::SCALED_AFTER ? 4 : 2, a[0]);

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
        u32* const now = a[TWO_HALVES ? kb % 2 : 0];
        u32* const next = a[TWO_HALVES ? 1 - kb % 2 : 0];
        if (kb % CHUNK == 0) barrier_wait(full + slot + kb / CHUNK, phase);
        const u64 x = x_unit + kb * (BLOCK_BYTES / 16);
        const float2 scale = block_scales;
        if constexpr (Operand::SCALED_AFTER) {
          float part[ROWS / 2];
          wgmma_begin();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            wgmma(part, now + i * 4, x + i * 16, i > 0);
            if (!TWO_HALVES && i == 1) wgmma_close();
          }
          wgmma_close();
          codes = next_codes((kb + 1) % BLOCKS);
          if constexpr (!TWO_HALVES) wgmma_wait<1>();
          decode(codes, 0, TWO_HALVES ? 4 : 2, next);
          wgmma_wait<0>();
          settle(part);
          if (kb % CHUNK == CHUNK - 1) release(slot + kb / CHUNK);
#pragma unroll
          for (int i = 0; i < ROWS / 2; ++i) sum[i] += part[i] * (i & 2 ? scale.y : scale.x);
          if constexpr (!TWO_HALVES) decode(codes, 2, 4, next);
        } else {
          const int before = kb > 0 ? slot + kb / CHUNK - 1 : (slot == 0 ? SLOTS : slot) - 1;
          const bool chunk_before = kb % CHUNK == 0 && (kb > 0 || unit > first_unit);
          wgmma_begin();
#pragma unroll
          for (int i = 0; i < (TWO_HALVES ? 4 : 2); ++i) wgmma(sum, now + i * 4, x + i * 16, unit > first_unit || kb > 0 || i > 0);
          wgmma_close();
          if constexpr (!TWO_HALVES) {
            wgmma_wait<1>();
            if (chunk_before) release(before);
            decode(codes, 2, 4, now);
            wgmma_begin();
#pragma unroll
            for (int i = 2; i < 4; ++i) wgmma(sum, now + i * 4, x + i * 16, true);
            wgmma_close();
          }
          codes = next_codes((kb + 1) % BLOCKS);
          wgmma_wait<1>();
          if (TWO_HALVES && chunk_before) release(before);
          decode(codes, 0, TWO_HALVES ? 4 : 2, next);
        }
      }
      slot += BLOCKS / CHUNK;
      if (slot == SLOTS) slot = 0, phase ^= 1;
    }
    if constexpr (!Operand::SCALED_AFTER) {
      wgmma_wait<0>();
      settle(sum);
      release((slot == 0 ? SLOTS : slot) - 1);
    }

    if (first_unit == 0 && unit == units) {
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) {
        const int row = (w_tile * WARPS + warp) * TILE + lane.group + (i & 2) * 4;
        const int column = m_tile * ROWS + i / 4 * 8 + lane.quad * 2 + (i & 1);
        if (row < p.n && column < p.m) store_output(p, row, column, format.finish(row, sum[i]));
      }
    } else {
      const u32 from = (u32)(w_tile * m_tiles + m_tile) * units;
      const int place = blockIdx.x * 2 + (begin < from);
      float4* const to = reinterpret_cast<float4*>(p.partial) + (size_t)place * GROUPS * THREADS + threadIdx.x;
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) __stcg(to + j * THREADS, make_float4(sum[j * 4], sum[j * 4 + 1], sum[j * 4 + 2], sum[j * 4 + 3]));
      multipliers_meet();
      if (threadIdx.x == (two && begin < from ? THREADS / 2 : 0)) {   // who will wait for the others, too, and must see itself
        // One for all: the barrier puts every thread's stores before it.
        u32* const counter = p.arrivals + run_owner(from, all_units, gridDim.x);
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      }
    }
    unit = 0;
    if (++m_tile == m_tiles) m_tile = 0, ++w_tile;
  }
  copies_wait<0>();

  // Shared tiles, of which half of the warps see to each where there are two. A small product spends half of its time here:
  // nothing waits for what could be under way.
  const int team = two && warp >= WARPS / 2, team_threads = two ? THREADS / 2 : THREADS, member = threadIdx.x - team * (THREADS / 2);
  const int tile = team == 1 || !is_shared(first_tile) ? last_tile : first_tile;
  if (!is_shared(tile)) return;
  auto team_meets = [&] { asm volatile("bar.sync %0, %1;" ::"r"(2 + team), "r"(team_threads) : "memory"); };
  const u32 from = (u32)tile * units;
  const int first = run_owner(from, all_units, gridDim.x), last = run_owner(from + units - 1, all_units, gridDim.x);
  const u32 sharers = last - first + 1;
  u32* const counter = p.arrivals + first;
  auto place_of = [&](int c) { return c * 2 + (run_begin(c, all_units, gridDim.x) < from); };
  auto clean_up = [&](u32 count, u32 how) {   // the last to be done; `count` is what it found
    if (count / DONE % DONE != sharers - 1) return;
    for (int c = first; count + how >= LEFT && c <= last; ++c) p.arrivals[FLAGS + place_of(c)] = 0;
    *counter = 0;
  };
  bool is_done = false;
  if (member == 0) {
    const long long give_up = clock64() + PATIENCE;
    u32 count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    } while (count % DONE < sharers && clock64() < give_up);
    adds_part[team] = true, others_left[team] = count >= LEFT;
    if (count % DONE < sharers) {
      p.arrivals[FLAGS + place_of(blockIdx.x)] = 1;
      __threadfence();
      is_done = true, others_left[team] = false;
      count = atomicAdd(counter, DONE + LEFT);
      clean_up(count, DONE + LEFT);
      adds_part[team] = count % DONE == sharers;   // they all came after all
      __threadfence();
    }
  }
  team_meets();
  constexpr u32 VALUES = GROUPS * THREADS, TOGETHER = GROUPS < 4 ? 2 : 4;   // of four sums
  constexpr int PARTS = WARPGROUPS == 4 ? 3 : 6;                            // whose loads are in flight together
  const float4* const parts = reinterpret_cast<const float4*>(p.partial);
  auto add_part = [&](u32 part) {
    const u32 to = VALUES * (part + 1) / sharers;
    for (u32 begin_at = VALUES * part / sharers + member - lane.id; begin_at < to; begin_at += team_threads * TOGETHER) {   // whole warps
      const u32 at = begin_at + lane.id;
      float total[TOGETHER][4] = {};
      for (int c = first; c <= last; c += PARTS) {
        const int place = place_of(min(c + lane.id % 8, last));   // one division for all
        const float4* from_part[PARTS];
        float4 v[PARTS][TOGETHER];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) from_part[i] = parts + (size_t)__shfl_sync(0xffffffffu, place, i) * VALUES + at;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
#pragma unroll
          for (int j = 0; j < TOGETHER; ++j) {
            v[i][j] = read_if(c + i <= last && at + j * team_threads < to, from_part[i] + j * team_threads);
          }
        }
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
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
          if (i < to && row < p.n && column < p.m) store_output(p, row, column, format.finish(row, total[j][c]));
        }
      }
    }
  };
  // Its own part, and those that were left: all who see these add up the same values. One loop, so that the code is there
  // once. Where none was left nobody looks at the counter again, and its answer comes while the part is added up.
  const bool more = others_left[team];
  u32 count = 0;
  if (member == 0 && !is_done && !more) count = atomicAdd(counter, DONE);
  for (int c = more ? first : (int)blockIdx.x; c <= (more ? last : (int)blockIdx.x); ++c) {
    if (c == blockIdx.x ? adds_part[team] : __ldcg(p.arrivals + FLAGS + place_of(c)) != 0) add_part(c - first);
  }
  if (more) team_meets();   // all have read the flags
  if (member == 0 && !is_done) {
    if (more) count = atomicAdd(counter, DONE);
    clean_up(count, DONE);
  }
}
