// Computes: all layers of the network for one new token of one sequence, in one launch
// Shapes: ids, positions int32 [1]; caches bf16 [blocks, block size, kv_heads, HEAD_DIM]; x bf16 [hidden] for the head
// Runs: megakernel/decode_step.py, a cooperative launch of one block an SM (or fewer)
// Schedule: megakernel: persistent blocks, one weight ring for all GEMVs, Stream-K split, flagged words between SMs
// Invariants: fixed order of sums; no word is rewritten before all have read it; a negative position: nothing is done
//
// A layer is four GEMVs with little between them. In a launch of its own each begins with an empty pipe to memory. Here every warp
// has one ring of asynchronous copies for all GEMVs of all layers, whose weights it reads in an order known from the start: while
// the blocks wait for one GEMV's result, the next one's weights arrive. (The same idea: "No Bubbles", Hazy Research 2025.) Blocks
// exchange results as flagged words (flags.cuh), so there is no barrier over the grid: a block goes on as soon as the values it
// needs are there. Every block keeps the residual stream and computes every norm for itself, in the same order.
//
// The stages of a weight matrix (16 rows by Format::K_BLOCK columns, tile by tile) are split evenly over the blocks, and a block's
// stages over its warps. A tile that warps share is summed in shared memory. One that blocks share comes as several partial sums,
// which the reader adds. Why no word is written too early: every block has a part of every GEMV, and a block begins a GEMV only
// when it has seen all of the one before.
//
// Compiled after launch.cuh, gemv.cuh, a format's file, rope.cuh, attention/attention.cuh, flags.cuh, attention.cuh,
// work_split.cuh and residual.cuh.

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(Step p) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const codebook = shared;
  u8* const xs = codebook + Format::CODEBOOK_BYTES + RING_BYTES;   // x, or the attention's states
  Format* const formats = reinterpret_cast<Format*>(xs + p.x_bytes);   // of all matrices: reads from memory would wait behind weights
  Layer* const layers = reinterpret_cast<Layer*>(formats + p.layer_count * KINDS);
  __shared__ Shared s;

  const int position = p.positions[0];
  if (position < 0) return;
  const u32 epoch = *p.epoch;
  const int warp = threadIdx.x / 32, matrices = p.layer_count * KINDS;
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  split_work(p, s);
#pragma unroll 1
  for (int sliding = 0; sliding < 2; ++sliding) {
    plan_split(s.splits[sliding], position, p.windows[sliding], p.kv_heads, p.block_shift, p.block_tables[sliding],
             p.ropes[sliding] + (size_t)position * HEAD_DIM);
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < matrices * (int)sizeof(Format) / 8; i += THREADS) {
    reinterpret_cast<u64*>(formats)[i] = reinterpret_cast<const u64*>(p.formats)[i];
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.layer_count; i += THREADS) layers[i] = p.layers[i];
  __syncthreads();

  // The ring: this warp's stages of all matrices, one after another.
  u8* const ring = codebook + Format::CODEBOOK_BYTES + warp * BLOCK_STAGES * Format::STAGE_BYTES;
  int load_matrix = -1, load_tile = 0, load_left = 0, to_load = 0;   // load_left: stages of the tile
  typename Format::Cursor load_cursor = {};
  auto load_one = [&](u8* stage) {
    while (to_load == 0 && load_matrix + 1 < matrices) {
      const WarpWork work = s.warps[++load_matrix % KINDS][warp];
      const int kind = load_matrix % KINDS;
      load_tile = work.tile, load_left = p.k_blocks[kind] - work.k_block, to_load = work.count;
      load_cursor = formats[load_matrix].cursor(lane, weight_tile(p, kind, load_tile), work.k_block);
    }
    if (to_load > 0) {
      formats[load_matrix].load(stage, lane, load_cursor);
      --to_load;
      Format::advance(load_cursor);
      if (--load_left == 0) {
        const int kind = load_matrix % KINDS;
        load_left = p.k_blocks[kind];
        load_cursor = formats[load_matrix].cursor(lane, weight_tile(p, kind, ++load_tile), 0);
      }
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < BLOCK_STAGES; ++i) load_one(ring + i * Format::STAGE_BYTES);
  formats[0].fill_codebook(codebook, THREADS);

  const int thread0 = this_thread();
  u32 more[2] = {0, 0};   // partial sums beyond the first, four bits for each of a thread's float4s of the residual stream
#pragma unroll
  for (int i = 0; i < HIDDEN_FLOAT4S; ++i) {
#pragma unroll
    for (int from = 0; from < 2; ++from) {
      const u32 kind = from == 0 ? O : DOWN, k_blocks = p.k_blocks[kind], units = units_of(p, kind), begin = column_of(thread0, i) / TILE * k_blocks;
      if (column_of(thread0, i) >= p.hidden) continue;
      more[from] |= (split_owner(begin + k_blocks - 1, units, gridDim.x) - split_owner(begin, units, gridDim.x)) << 4 * i;
    }
  }
  float* const residual = p.residual + (size_t)blockIdx.x * p.hidden;
  embed(p, s, xs, residual);

  int slot = 0;
  typename Format::Scale scale = formats[0].scale(lane, s.warps[0][warp].tile, s.warps[0][warp].k_block);
  for (int matrix = 0;; ++matrix) {
    if (matrix == matrices) {   // block 0 has one round more, for the last layer's result
      next_kernel_may_start();
      if (blockIdx.x > 0) return;
    }
    const int kind = matrix % KINDS, layer = matrix / KINDS, k_blocks = p.k_blocks[kind];
    const int thread = this_thread();
    const u32 tag = epoch + layer;
    const BlockWork block = s.work[kind];
    const float* const norm = p.norms + (size_t)(1 + layer * 4) * p.hidden;
    if (kind == QKV && matrix < matrices) {   // prefetch what this layer reads late: behind the weights in flight it would arrive too late
      const Split& split = s.splits[layers[layer].sliding];
      if (split.unit + warp < split.unit_end) {
        prefetch_row(layers[layer].keys, layers[layer].values, split.slots[warp * UNIT + prefetched_token(lane.id)], p.kv_heads, lane.id);
      }
      const int line = thread * gridDim.x + blockIdx.x;   // of four norms, 32 values each
      if (line < p.hidden / 8) asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + line * 32));
    }

    // x
    int columns = p.hidden;
    if (kind == QKV || kind == GATE_UP) {
      const int from = kind == QKV;   // whose result is added: DOWN of the layer before, or O of this one
      if (matrix > 0) add_norm(p, s, xs, residual, p.partials[from], from ? more[1] : more[0], norm - (from ? 2 : 0) * p.hidden, tag - from);
    } else {
      if (kind == O) {
        const bool sliding = layers[layer].sliding != 0;
        attend({p.qkv, p.attended, p.lse, p.partial, layers[layer].keys, layers[layer].values, p.block_tables[sliding],
                p.head_norms != nullptr ? p.head_norms + layer * 2 * HEAD_DIM : nullptr, p.scale, p.softcap, p.eps, p.kv_heads,
                p.block_shift, position, tag},
               s.splits[sliding], *reinterpret_cast<States*>(xs));
        __syncthreads();   // x overwrites the attention's states
        columns = GROUP * p.kv_heads * HEAD_DIM;
        if (s.splits[sliding].outputs > 1) gather_splits(xs, p.attended, p.lse, s.splits[sliding].outputs, columns, tag);
      } else {
        columns = p.tiles[GATE_UP] / 2 * TILE;
      }
      if (kind == DOWN || s.splits[layers[layer].sliding].outputs == 1) gather(xs, kind == O ? p.attended : p.activated, columns, tag);
    }
    if (matrix == matrices) break;
#pragma unroll 1
    for (int i = columns / 8 + thread; i < k_blocks * Format::K_BLOCK / 8; i += THREADS) {
      reinterpret_cast<uint4*>(xs)[i] = make_uint4(0, 0, 0, 0);   // columns of the last k_block that W does not have
    }
    float row_scales[2] = {1.f, 1.f};   // of the row that this thread will add up first, loaded meanwhile
    {
      const int pair = kind == GATE_UP, tile = block.first_tile + (thread / TILE << pair), row = thread % TILE;
      if (thread < (block.tiles >> pair) * TILE) {
        row_scales[0] = formats[matrix].row_scale(weight_tile(p, kind, tile) * TILE + row);
        if (pair) row_scales[1] = formats[matrix].row_scale(weight_tile(p, kind, tile + 1) * TILE + row);
      }
    }
    __syncthreads();

    // the GEMV
    const Format format = formats[matrix];
    int tile = s.warps[kind][warp].tile, k_block = s.warps[kind][warp].k_block;
    typename Format::ScaleCursor scale_cursor = format.scale_cursor(lane, weight_tile(p, kind, tile), k_block);
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int i = s.warps[kind][warp].count; i > 0; --i) {
      u8* const stage = ring + slot * Format::STAGE_BYTES;
      slot = slot + 1 == BLOCK_STAGES ? 0 : slot + 1;
      cp_async_wait<BLOCK_STAGES - 1>();
      __syncwarp();
      const typename Format::Fragment fragment = format.fetch(stage, lane);
      __syncwarp();
      load_one(stage);
      const bool tile_done = k_block + 1 == k_blocks;
      Format::advance(scale_cursor);
      if (tile_done) scale_cursor = format.scale_cursor(lane, weight_tile(p, kind, tile + 1), 0);
      const typename Format::Scale next_scale = format.scale(scale_cursor);
      format.multiply_row(fragment, scale, codebook, xs + k_block * (Format::K_BLOCK * 2), lane, sum);
      scale = next_scale;
      ++k_block;
      if (tile_done || i == 1) {
        if (i > k_blocks) format.fetch_scales(lane, weight_tile(p, kind, tile + 2));
        float low = sum[0], high = sum[2];
#pragma unroll
        for (int quads = 1; quads < 4; quads *= 2) {
          low += __shfl_xor_sync(0xffffffffu, low, quads);
          high += __shfl_xor_sync(0xffffffffu, high, quads);
        }
        float* const to = s.warp_sums[warp][(tile - block.first_tile) % SLOTS] + lane.group;
        if (lane.quad == 0) to[0] = low, to[8] = high;
        sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
        k_block = 0, ++tile;
      }
    }
    if (matrix + 1 < matrices) {   // early, so that nothing waits for it later
      const WarpWork next = s.warps[(matrix + 1) % KINDS][warp];
      const int first = weight_tile(p, (matrix + 1) % KINDS, next.tile);
      scale = formats[matrix + 1].scale(lane, first, next.k_block);
      formats[matrix + 1].fetch_scales(lane, first);
      formats[matrix + 1].fetch_scales(lane, weight_tile(p, (matrix + 1) % KINDS, next.tile + 1));
    }
    __syncthreads();

    // the sums over warps, and the epilogue
    auto total = [&](int local, int r) {
      const u32 owners = s.owners[kind][local];
      float value = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float part = s.warp_sums[w][local % SLOTS][r];
        if (owners >> w & 1) value += part;
      }
      return value;
    };
    if (kind == GATE_UP) {
#pragma unroll 1
      for (int i = thread; i < block.tiles / 2 * TILE; i += THREADS) {
        const int local = i / TILE * 2, r = i % TILE, pair = block.first_tile / 2 + i / TILE, row = pair * TILE + r;
        if (i >= THREADS) {
          row_scales[0] = format.row_scale(row);
          row_scales[1] = format.row_scale(row + p.tiles[kind] / 2 * TILE);
        }
        publish(p.activated + row, gated(total(local, r) * row_scales[0], total(local + 1, r) * row_scales[1]), tag);
      }
    } else {
      u32* const to = kind == QKV ? p.qkv : p.partials[kind == DOWN];
#pragma unroll 1
      for (int i = thread; i < block.tiles * TILE; i += THREADS) {
        const int local = i / TILE, r = i % TILE, row = (block.first_tile + local) * TILE + r;
        if (i >= THREADS) row_scales[0] = format.row_scale(row);
        publish(to + (local == 0 ? block.first_partial : 0) * p.hidden + row, total(local, r) * row_scales[0], tag);
      }
    }
  }

  for (int i = 0; i < HIDDEN_FLOAT4S; ++i) {   // its own values, no other thread's
    const int column = column_of(thread0, i);
    if (column < p.hidden) *reinterpret_cast<uint2*>(p.x + column) = *reinterpret_cast<const uint2*>(xs + column * 2);
  }
  if (thread0 == 0) *p.epoch = epoch + p.layer_count;   // all blocks have read it: their last results have come
}
