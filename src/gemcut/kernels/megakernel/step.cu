// All layers of the network for one new token, in one launch of one block a processor.
//
// A layer is four matrix-vector products with little between them. In a launch of its own each begins with an empty pipe to
// memory; here every warp has one ring of asynchronous copies for all products of all layers, whose weights it reads in an
// order known from the start: while the blocks wait for one product's result, the next products' weights arrive. Blocks
// exchange results as tagged words (words.cuh), so there is no barrier over the grid: a block goes on as soon as the values
// it needs are there. Every block keeps the residual stream and computes every norm for itself, in the same order.
//
// A product's stages (16 rows of W by Format::STEP columns, tile by tile) are dealt out evenly to the blocks, and a block's
// evenly to its warps. A tile that warps share is summed in shared memory; one that blocks share comes as PIECES words,
// which the reader adds. No word is written again before all blocks have read it: every block has a part of every product,
// and a block begins a product only when it has seen all of the one before.
//
// Compiled after launch.cuh, matvec.cuh, a format's file, rope.cuh, attention.cuh, words.cuh, step_attention.cuh,
// step_shares.cuh and step_stream.cuh.

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(Step p) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const tables = shared;
  u8* const xs = tables + Format::TABLE_BYTES + RING_BYTES;   // x, or the attention's states
  Format* const formats = reinterpret_cast<Format*>(xs + p.x_bytes);   // of all products: their reads would wait behind weights
  Layer* const layers = reinterpret_cast<Layer*>(formats + p.layer_count * KINDS);
  __shared__ Shared s;

  const int position = p.positions[0];
  if (position < 0) return;
  const u32 epoch = *p.epoch;
  const int warp = threadIdx.x / 32, products = p.layer_count * KINDS;
  Lane lane;
  lane.id = threadIdx.x % 32;
  lane.group = lane.id / 4;
  lane.quad = lane.id % 4;

  share_out(p, s);
#pragma unroll 1
  for (int sliding = 0; sliding < 2; ++sliding) {
    plan_run(s.runs[sliding], position, p.windows[sliding], p.kv_heads, p.block_shift, p.block_tables[sliding],
             p.ropes[sliding] + (size_t)position * HEAD_DIM);
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < products * (int)sizeof(Format) / 8; i += THREADS) {
    reinterpret_cast<u64*>(formats)[i] = reinterpret_cast<const u64*>(p.formats)[i];
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.layer_count; i += THREADS) layers[i] = p.layers[i];
  __syncthreads();

  // The ring: this warp's stages of all products, one after another.
  u8* const ring = tables + Format::TABLE_BYTES + warp * BLOCK_STAGES * Format::STAGE_BYTES;
  int load_product = -1, load_tile = 0, load_left = 0, to_load = 0;   // load_left: stages of the tile
  typename Format::Place load_place = {};
  auto load_one = [&](u8* stage) {
    while (to_load == 0 && load_product + 1 < products) {
      const WarpShare share = s.warps[++load_product % KINDS][warp];
      const int kind = load_product % KINDS;
      load_tile = share.tile, load_left = p.steps[kind] - share.step, to_load = share.count;
      load_place = formats[load_product].place(lane, place_of(p, kind, load_tile), share.step);
    }
    if (to_load > 0) {
      formats[load_product].load(stage, lane, load_place);
      --to_load;
      Format::next(load_place);
      if (--load_left == 0) {
        const int kind = load_product % KINDS;
        load_left = p.steps[kind];
        load_place = formats[load_product].place(lane, place_of(p, kind, ++load_tile), 0);
      }
    }
    copies_close();
  };
#pragma unroll 1
  for (int i = 0; i < BLOCK_STAGES; ++i) load_one(ring + i * Format::STAGE_BYTES);
  formats[0].fill_tables(tables, THREADS);

  const int thread0 = this_thread();
  u32 more[2] = {0, 0};   // pieces beyond the first, four bits for each of a thread's fours of the residual stream
#pragma unroll
  for (int i = 0; i < FOURS; ++i) {
#pragma unroll
    for (int from = 0; from < 2; ++from) {
      const u32 kind = from == 0 ? O : DOWN, steps = p.steps[kind], units = units_of(p, kind), begin = column_of(thread0, i) / TILE * steps;
      if (column_of(thread0, i) >= p.hidden) continue;
      more[from] |= (run_owner(begin + steps - 1, units, gridDim.x) - run_owner(begin, units, gridDim.x)) << 4 * i;
    }
  }
  float* const residual = p.residual + (size_t)blockIdx.x * p.hidden;
  embed(p, s, xs, residual);

  int slot = 0;
  typename Format::Scale scale = formats[0].scale(lane, s.warps[0][warp].tile, s.warps[0][warp].step);
  for (int product = 0;; ++product) {
    if (product == products) {   // block 0 has one round more, for the last layer's result
      next_kernel_may_start();
      if (blockIdx.x > 0) return;
    }
    const int kind = product % KINDS, layer = product / KINDS, steps = p.steps[kind];
    const int thread = this_thread();
    const u32 tag = epoch + layer;
    const Share block = s.share[kind];
    const float* const norm = p.norms + (size_t)(1 + layer * 4) * p.hidden;
    if (kind == QKV && product < products) {   // what this layer reads late: behind the weights in flight it would come too late
      const Run& run = s.runs[layers[layer].sliding];
      if (run.unit + warp < run.unit_end) {
        ask_for(layers[layer].keys, layers[layer].values, run.places[warp * UNIT + asked_token(lane.id)], p.kv_heads, lane.id);
      }
      const int line = thread * gridDim.x + blockIdx.x;   // of four norms, 32 values each
      if (line < p.hidden / 8) asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + line * 32));
    }

    // x
    int columns = p.hidden;
    if (kind == QKV || kind == GATE_UP) {
      const int from = kind == QKV;   // which product comes back: DOWN of the layer before, or O of this one
      if (product > 0) rejoin(p, s, xs, residual, p.pieces[from], from ? more[1] : more[0], norm - (from ? 2 : 0) * p.hidden, tag - from);
    } else {
      if (kind == O) {
        const bool sliding = layers[layer].sliding != 0;
        attend({p.qkv, p.attended, p.shares, p.partial, layers[layer].keys, layers[layer].values, p.block_tables[sliding],
                p.head_norms != nullptr ? p.head_norms + layer * 2 * HEAD_DIM : nullptr, p.scale, p.softcap, p.eps, p.kv_heads,
                p.block_shift, position, tag},
               s.runs[sliding], *reinterpret_cast<States*>(xs));
        __syncthreads();   // x takes the place of the attention's states
        columns = GROUP * p.kv_heads * HEAD_DIM;
        if (s.runs[sliding].pieces > 1) gather_runs(xs, p.attended, p.shares, s.runs[sliding].pieces, columns, tag);
      } else {
        columns = p.tiles[GATE_UP] / 2 * TILE;
      }
      if (kind == DOWN || s.runs[layers[layer].sliding].pieces == 1) gather(xs, kind == O ? p.attended : p.activated, columns, tag);
    }
    if (product == products) break;
#pragma unroll 1
    for (int i = columns / 8 + thread; i < steps * Format::STEP / 8; i += THREADS) {
      reinterpret_cast<uint4*>(xs)[i] = make_uint4(0, 0, 0, 0);   // columns of the last step that W does not have
    }
    float row_scales[2] = {1.f, 1.f};   // of the row that this thread will add up first, on their way meanwhile
    {
      const int pair = kind == GATE_UP, tile = block.first_tile + (thread / TILE << pair), row = thread % TILE;
      if (thread < (block.tiles >> pair) * TILE) {
        row_scales[0] = formats[product].row_scale(place_of(p, kind, tile) * TILE + row);
        if (pair) row_scales[1] = formats[product].row_scale(place_of(p, kind, tile + 1) * TILE + row);
      }
    }
    __syncthreads();

    // the product
    const Format format = formats[product];
    int tile = s.warps[kind][warp].tile, step = s.warps[kind][warp].step;
    typename Format::ScalePlace scale_place = format.scale_place(lane, place_of(p, kind, tile), step);
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int i = s.warps[kind][warp].count; i > 0; --i) {
      u8* const stage = ring + slot * Format::STAGE_BYTES;
      slot = slot + 1 == BLOCK_STAGES ? 0 : slot + 1;
      copies_wait<BLOCK_STAGES - 1>();
      __syncwarp();
      const typename Format::Fragment fragment = format.fetch(stage, lane);
      __syncwarp();
      load_one(stage);
      const bool tile_done = step + 1 == steps;
      Format::next(scale_place);
      if (tile_done) scale_place = format.scale_place(lane, place_of(p, kind, tile + 1), 0);
      const typename Format::Scale next_scale = format.scale(scale_place);
      format.multiply_row(fragment, scale, tables, xs + step * (Format::STEP * 2), lane, sum);
      scale = next_scale;
      ++step;
      if (tile_done || i == 1) {
        if (i > steps) format.fetch_scales(lane, place_of(p, kind, tile + 2));
        float low = sum[0], high = sum[2];
#pragma unroll
        for (int quads = 1; quads < 4; quads *= 2) {
          low += __shfl_xor_sync(0xffffffffu, low, quads);
          high += __shfl_xor_sync(0xffffffffu, high, quads);
        }
        float* const to = s.segments[warp][(tile - block.first_tile) % SLOTS] + lane.group;
        if (lane.quad == 0) to[0] = low, to[8] = high;
        sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
        step = 0, ++tile;
      }
    }
    if (product + 1 < products) {   // early, so that nothing waits for it later
      const WarpShare next = s.warps[(product + 1) % KINDS][warp];
      const int first = place_of(p, (product + 1) % KINDS, next.tile);
      scale = formats[product + 1].scale(lane, first, next.step);
      formats[product + 1].fetch_scales(lane, first);
      formats[product + 1].fetch_scales(lane, place_of(p, (product + 1) % KINDS, next.tile + 1));
    }
    __syncthreads();

    // the sums
    auto total = [&](int local, int r) {
      const u32 owners = s.owners[kind][local];
      float value = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float part = s.segments[w][local % SLOTS][r];
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
      u32* const to = kind == QKV ? p.qkv : p.pieces[kind == DOWN];
#pragma unroll 1
      for (int i = thread; i < block.tiles * TILE; i += THREADS) {
        const int local = i / TILE, r = i % TILE, row = (block.first_tile + local) * TILE + r;
        if (i >= THREADS) row_scales[0] = format.row_scale(row);
        publish(to + (local == 0 ? block.first_piece : 0) * p.hidden + row, total(local, r) * row_scales[0], tag);
      }
    }
  }

  for (int i = 0; i < FOURS; ++i) {   // its own values, no other thread's
    const int column = column_of(thread0, i);
    if (column < p.hidden) *reinterpret_cast<uint2*>(p.x + column) = *reinterpret_cast<const uint2*>(xs + column * 2);
  }
  if (thread0 == 0) *p.epoch = epoch + p.layer_count;   // all blocks have read it: their last results have come
}
