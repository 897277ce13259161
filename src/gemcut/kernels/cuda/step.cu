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
// Compiled after launch.cuh, matvec.cuh, a format's file, rope.cuh, words.cuh and step_attention.cuh.

enum { QKV, O, GATE_UP, DOWN, KINDS };

struct Layer {
  u16* keys;             // [blocks, block size, kv_heads, HEAD_DIM]
  u16* values;
  long long sliding;     // 1: attends to a window
};

struct Step {
  const Format* formats;        // [layers, KINDS]
  const ulonglong2* sources;    // [layers, KINDS]: for Format::point
  const Layer* layers;
  const float* norms;           // [1 + layers * 4, hidden]: the first layer's input; then of each layer after attention, before and
                                // after the MLP, and of what follows
  const float* head_norms;      // [layers, 2, HEAD_DIM]: of queries and keys, or null
  const u8* table;              // the embedding, bf16 or int8 [vocabulary, hidden]
  const float* absmax;          // [vocabulary] where it is int8
  const int* ids;
  const int* positions;         // [1]; negative: nothing to do
  const int* block_tables[2];   // of full and of sliding layers
  const float* ropes[2];
  u32* qkv;                     // words, each written once a layer: what attention reads,
  u32* attended;                // what it gives,
  u32* activated;               // gelu(gate) * up,
  u32* pieces[2];               // [PIECES, hidden] of the products that come back into the residual stream
  u64* partial;                 // packets: see Attention
  float* residual;              // [blocks, hidden]
  u32* epoch;                   // how many layers were ever computed with these words
  u16* x;                       // bf16 [hidden]: the result, normalised for the head
  float embed_scale, eps, scale, softcap;
  int layer_count, hidden, kv_heads, block_shift, x_bytes;
  int windows[2];
  int tiles[KINDS], steps[KINDS];
};

constexpr int THREADS = WARPS * 32;

// Waits for this thread's copies but for the last `newer` groups of them.
__device__ __forceinline__ void wait_for_older_than(int newer) {
  switch (newer) {
    case 0: return copies_wait<0>();
    case 1: return copies_wait<1>();
    case 2: return copies_wait<2>();
    case 3: return copies_wait<3>();
    case 4: return copies_wait<4>();
    case 5: return copies_wait<5>();
    case 6: return copies_wait<6>();
    default: return copies_wait<7>();
  }
}
constexpr int RING_BYTES = WARPS * BLOCK_STAGES * Format::STAGE_BYTES;

// What a block has of each kind of product: the same in every layer.
struct Share {
  int first_tile, tiles;
  int first_piece;       // which piece of its first tile; it has the first of all others
};
struct WarpShare { int tile, step, count; };

struct Shared {
  Format shapes[KINDS];  // of the first layer's products
  Format formats[3];     // of product i at i % 3: this one's, the next one's, and the one before, whose rows may still be added up
  Share share[KINDS];
  WarpShare warps[KINDS][WARPS];
  u16 owners[KINDS][MOST_TILES];        // a bit for each warp that has a part of the tile
  float segments[WARPS][SLOTS][TILE];   // of each warp: sums of its last tiles
  float4 sums[WARPS];
  Run runs[2];                          // of layers that attend to the whole context; of those that slide
};

__device__ __forceinline__ u32 units_of(const Step& p, int kind) {
  return kind == QKV ? p.tiles[kind] : kind == GATE_UP ? p.tiles[kind] / 2 : p.tiles[kind] * p.steps[kind];
}
// Gate and up stand one below the other and are computed in turns, so that both halves of a value are in one block.
__device__ __forceinline__ int place_of(const Step& p, int kind, int tile) {
  return kind == GATE_UP ? (tile & 1) * (p.tiles[kind] / 2) + (tile >> 1) : tile;
}

__device__ __forceinline__ void share_out(const Step& p, Shared& s) {
  constexpr int EACH = WARPS + MOST_TILES;
#pragma unroll 1
  for (int i = threadIdx.x; i < KINDS * EACH; i += THREADS) {   // of each kind: its warps, then its tiles
    const int kind = i / EACH, place = i % EACH;
    const u32 units = units_of(p, kind), steps = p.steps[kind], stages = p.tiles[kind] * steps, unit = stages / units;
    const u32 begin = blockIdx.x * units / gridDim.x * unit, end = (blockIdx.x + 1) * units / gridDim.x * unit;
    const u32 total = end - begin, first = begin / steps, count = (end - 1) / steps - first + 1;
    if (place < WARPS) {
      const u32 from = begin + place * total / WARPS, to = begin + (place + 1) * total / WARPS;
      s.warps[kind][place] = {(int)(from / steps), (int)(from % steps), (int)(to - from)};
      if (place == 0) {
        s.share[kind] = {(int)first, (int)count, unit > 1 ? 0 : (int)(blockIdx.x - run_owner(first * steps, units, gridDim.x))};
      }
    } else if (place - WARPS < count) {
      const u32 tile = first + place - WARPS, start = max(tile * steps, begin) - begin, stop = min((tile + 1) * steps, end) - begin;
      u32 owners = 0;
#pragma unroll
      for (u32 w = 0; w < WARPS; ++w) {
        const u32 from = max(run_begin(w, total, WARPS), start), to = min(run_begin(w + 1, total, WARPS), stop);
        owners |= (from < to) << w;
      }
      s.owners[kind][place - WARPS] = owners;
    }
  }
}

// Four sums over the block at once; `scratch` holds one of each warp.
__device__ __forceinline__ float4 block_sums(float4 v, float4* scratch) {
  __syncwarp();   // lanes come from a wait one by one; a shuffle of a warp that is not together costs a hundred cycles
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, lanes), v.y += __shfl_xor_sync(0xffffffffu, v.y, lanes);
    v.z += __shfl_xor_sync(0xffffffffu, v.z, lanes), v.w += __shfl_xor_sync(0xffffffffu, v.w, lanes);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, lanes), v.y += __shfl_xor_sync(0xffffffffu, v.y, lanes);
    v.z += __shfl_xor_sync(0xffffffffu, v.z, lanes), v.w += __shfl_xor_sync(0xffffffffu, v.w, lanes);
  }
  return v;
}

__device__ __forceinline__ float4 read4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float4 value4(const uint4& w) {
  return make_float4(word_value(w.x), word_value(w.y), word_value(w.z), word_value(w.w));
}
__device__ __forceinline__ float dot4(const float4& a, const float4& b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ __forceinline__ float4 product4(const float4& a, const float4& b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 scaled4(const float4& a, float s) { return make_float4(a.x * s, a.y * s, a.z * s, a.w * s); }
__device__ __forceinline__ uint2 pack4(const float4& v) { return make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)); }

// A thread has fours of a row of the residual stream.
struct Stream {
  float4 v[FOURS] = {};
};
__device__ __forceinline__ int column_of(int thread, int i) { return (thread + i * THREADS) * 4; }

// The embedding of the token, in residual and, normalised, in x.
__device__ __forceinline__ void embed(const Step& p, Shared& s, u8* xs, float* residual) {
  const int thread = this_thread();
  const size_t row = p.ids[0];
  Stream r;
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < FOURS; ++i) {
    const int column = column_of(thread, i);
    if (column >= p.hidden) continue;
    uint2 pairs;
    if (p.absmax == nullptr) {
      pairs = *reinterpret_cast<const uint2*>(p.table + (row * p.hidden + column) * 2);
    } else {   // rounded to bf16 once, as the plain embedding is
      const u32 word = *reinterpret_cast<const u32*>(p.table + row * p.hidden + column);
      const float unit = __fdiv_rn(p.absmax[row], 127.f);
      pairs = make_uint2(pack_bf16((signed char)word * unit, (signed char)(word >> 8) * unit),
                         pack_bf16((signed char)(word >> 16) * unit, (signed char)(word >> 24) * unit));
    }
    r.v[i] = scaled4(make_float4(low_bf16(pairs.x), high_bf16(pairs.x), low_bf16(pairs.y), high_bf16(pairs.y)), p.embed_scale);
    squares += dot4(r.v[i], r.v[i]);
    *reinterpret_cast<float4*>(residual + column) = r.v[i];
  }
  const float scale = rsqrtf(block_sums(make_float4(squares, 0.f, 0.f, 0.f), s.sums).x / p.hidden + p.eps);
#pragma unroll
  for (int i = 0; i < FOURS; ++i) {
    const int column = column_of(thread, i);
    if (column < p.hidden) *reinterpret_cast<uint2*>(xs + column * 2) = pack4(scaled4(product4(r.v[i], read4(p.norms + column)), scale));
  }
}

// residual += rms(y) * norm[0] for the sum y of the pieces; x = rms(residual) * norm[1]. `more` has, four bits for each of a
// thread's fours, how many pieces there are beyond the first.
template <class Meanwhile>
__device__ __forceinline__ void rejoin(const Step& p, Shared& s, u8* xs, float* residual, const u32* pieces, u32 more, const float* norm,
                                       u32 tag, Meanwhile meanwhile) {
  const int thread = this_thread();
  Stream r, post, pre, y;
  uint4 words[2 * FOURS] = {};
  u32 wanted = 0;
  auto at = [&](int i) { return pieces + (i & 1) * p.hidden + column_of(thread, i / 2); };
#pragma unroll
  for (int i = 0; i < FOURS; ++i) {
    const int column = column_of(thread, i);
    if (column >= p.hidden) continue;
    wanted |= ((more >> 4 * i & 15) > 0 ? 3 : 1) << 2 * i;
    words[2 * i] = load_words(at(2 * i));
    if (more >> 4 * i & 15) words[2 * i + 1] = load_words(at(2 * i + 1));
    r.v[i] = read4(residual + column), post.v[i] = read4(norm + column), pre.v[i] = read4(norm + p.hidden + column);
  }
  await_words(words, tag, wanted, at, meanwhile);
  // With t = y * norm[0] and f the norm's factor, the new residual's squares are r.r + 2 f r.t + f f t.t: one round of sums.
  float4 sums = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < FOURS; ++i) {
    if (column_of(thread, i) >= p.hidden) continue;
    y.v[i] = value4(words[2 * i]);
    const int count = more >> 4 * i & 15;
#pragma unroll 1
    for (int piece = 1; piece <= count; ++piece) {
      uint4 other[1] = {words[2 * i + 1]};
      if (piece > 1) {
        auto there = [&](int) { return pieces + piece * p.hidden + column_of(thread, i); };
        Patience patience;
        do {
          other[0] = load_words(there(0));
          patience.tick();
        } while (!are_here(other[0], tag));
      }
      const float4 v = value4(other[0]);
      y.v[i] = make_float4(y.v[i].x + v.x, y.v[i].y + v.y, y.v[i].z + v.z, y.v[i].w + v.w);
    }
    sums.x += dot4(y.v[i], y.v[i]);
    y.v[i] = product4(y.v[i], post.v[i]);
    sums.y += dot4(r.v[i], r.v[i]), sums.z += dot4(r.v[i], y.v[i]), sums.w += dot4(y.v[i], y.v[i]);
  }
  sums = block_sums(sums, s.sums);
  const float factor = rsqrtf(sums.x / p.hidden + p.eps);
  const float squares = fmaxf(sums.y + 2.f * factor * sums.z + factor * factor * sums.w, 0.f);
  const float scale = rsqrtf(squares / p.hidden + p.eps);
#pragma unroll
  for (int i = 0; i < FOURS; ++i) {
    const int column = column_of(thread, i);
    if (column >= p.hidden) continue;
    const float4 t = scaled4(y.v[i], factor);
    r.v[i] = make_float4(r.v[i].x + t.x, r.v[i].y + t.y, r.v[i].z + t.z, r.v[i].w + t.w);
    *reinterpret_cast<float4*>(residual + column) = r.v[i];
    *reinterpret_cast<uint2*>(xs + column * 2) = pack4(scaled4(product4(r.v[i], pre.v[i]), scale));
  }
}

// x = `count` words, rounded.
template <class Meanwhile>
__device__ __forceinline__ void gather(u8* xs, const u32* from, int count, u32 tag, Meanwhile meanwhile) {
  constexpr int BATCH = 6;
  const int thread = this_thread();
#pragma unroll 1
  for (int first = 0; first * 4 < count; first += THREADS * BATCH) {
    uint4 words[BATCH] = {};
    u32 wanted = 0;
    auto at = [&](int i) { return from + (first + thread + i * THREADS) * 4; };
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if ((first + thread + i * THREADS) * 4 < count) words[i] = load_words(at(i)), wanted |= 1u << i;
    }
    await_words(words, tag, wanted, at, meanwhile);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (wanted >> i & 1) *reinterpret_cast<uint2*>(xs + (first + thread + i * THREADS) * 8) = pack4(value4(words[i]));
    }
  }
}

__device__ __forceinline__ float gated(float gate, float up) {
  // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)); both ends are right when exp overflows or vanishes
  const float u = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  return __fdividef(gate, 1.f + __expf(-2.f * u)) * up;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(Step p) {
  extern __shared__ __align__(128) u8 shared[];
  u8* const tables = shared;
  u8* const xs = tables + Format::TABLE_BYTES + RING_BYTES;   // x, or the attention's states
  ulonglong2* const sources = reinterpret_cast<ulonglong2*>(xs + p.x_bytes);
  Layer* const layers = reinterpret_cast<Layer*>(sources + p.layer_count * KINDS);
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
  if (threadIdx.x < KINDS) s.shapes[threadIdx.x] = p.formats[threadIdx.x];
  if (threadIdx.x == 0) s.formats[0] = p.formats[0];
#pragma unroll 1
  for (int i = threadIdx.x; i < products; i += THREADS) sources[i] = p.sources[i];
#pragma unroll 1
  for (int i = threadIdx.x; i < p.layer_count; i += THREADS) layers[i] = p.layers[i];
  __syncthreads();

  // The ring: this warp's stages of all products, one after another.
  u8* const ring = tables + Format::TABLE_BYTES + warp * BLOCK_STAGES * Format::STAGE_BYTES;
  int load_product = -1, load_tile = 0, load_step = 0, to_load = 0, load_slot = 0, ahead = 0;   // `ahead`: stages loaded, not yet used
  auto load_one = [&] {
    while (to_load == 0 && load_product + 1 < products) {
      ++load_product;
      const WarpShare share = s.warps[load_product % KINDS][warp];
      load_tile = share.tile, load_step = share.step, to_load = share.count;
    }
    if (to_load > 0) {
      const int kind = load_product % KINDS;
      Format source = s.shapes[kind];
      source.point(sources[load_product]);
      source.load(ring + load_slot * Format::STAGE_BYTES, lane, place_of(p, kind, load_tile), load_step);
      copies_close();
      load_slot = load_slot + 1 == BLOCK_STAGES ? 0 : load_slot + 1;
      --to_load, ++ahead;
      if (++load_step == p.steps[kind]) load_step = 0, ++load_tile;
    }
  };
  auto load_all = [&] {
#pragma unroll 1
    for (int room = BLOCK_STAGES - ahead; room > 0; --room) load_one();
  };
  // Memory answers in the order it was asked, so what waits for words asks for few weights at a time.
  auto meanwhile = [&] {
    if (ahead < BLOCK_STAGES) load_one();
  };
  load_all();
  s.shapes[0].fill_tables(tables, THREADS);

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
  typename Format::Scale scale = s.formats[0].scale(lane, s.warps[0][warp].tile, s.warps[0][warp].step);
  for (int product = 0;; ++product) {
    if (product == products) {   // block 0 has one round more, for the last layer's result
      next_kernel_may_start();
      if (blockIdx.x > 0) return;
    }
    const int kind = product % KINDS, layer = product / KINDS, steps = p.steps[kind];
    const int thread = this_thread();
    const u32 tag = epoch + layer;
    const Share block = s.share[kind];
    u32 word_of_next = 0;   // of the next product's format
    const bool has_word = thread < sizeof(Format) / 4 && product + 1 < products;
    if (has_word) word_of_next = reinterpret_cast<const u32*>(p.formats + product + 1)[thread];
    const float* const norm = p.norms + (size_t)(1 + layer * 4) * p.hidden;

    // x
    int columns = p.hidden;
    if (kind == QKV || kind == GATE_UP) {
      const int from = kind == QKV;   // which product comes back: DOWN of the layer before, or O of this one
      if (product > 0) rejoin(p, s, xs, residual, p.pieces[from], from ? more[1] : more[0], norm - (from ? 2 : 0) * p.hidden, tag - from,
                              meanwhile);
    } else {
      if (kind == O) {
        const bool sliding = layers[layer].sliding != 0;
        attend({p.qkv, p.attended, p.partial, layers[layer].keys, layers[layer].values, p.block_tables[sliding],
                p.head_norms != nullptr ? p.head_norms + layer * 2 * HEAD_DIM : nullptr, p.scale, p.softcap, p.eps, p.kv_heads,
                p.block_shift, position, tag},
               s.runs[sliding], reinterpret_cast<float*>(xs));
        __syncthreads();   // x takes the place of the attention's states
      }
      columns = kind == O ? GROUP * p.kv_heads * HEAD_DIM : p.tiles[GATE_UP] / 2 * TILE;
      gather(xs, kind == O ? p.attended : p.activated, columns, tag, meanwhile);
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
        row_scales[0] = s.formats[product % 3].row_scale(place_of(p, kind, tile) * TILE + row);
        if (pair) row_scales[1] = s.formats[product % 3].row_scale(place_of(p, kind, tile + 1) * TILE + row);
      }
    }
    if (has_word) reinterpret_cast<u32*>(s.formats + (product + 1) % 3)[thread] = word_of_next;
    __syncthreads();

    // the product
    load_all();
    const Format format = s.formats[product % 3];
    int tile = s.warps[kind][warp].tile, step = s.warps[kind][warp].step;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int i = s.warps[kind][warp].count; i > 0; --i) {
      u8* const stage = ring + slot * Format::STAGE_BYTES;
      slot = slot + 1 == BLOCK_STAGES ? 0 : slot + 1;
      wait_for_older_than(ahead - 1);
      __syncwarp();
      const typename Format::Fragment fragment = format.fetch(stage, lane);
      __syncwarp();
      --ahead;
      if (ahead < IN_FLIGHT) load_one();
      const bool tile_done = step + 1 == steps;
      const typename Format::Scale next_scale = format.scale(lane, place_of(p, kind, tile + tile_done), tile_done ? 0 : step + 1);
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
      scale = s.formats[(product + 1) % 3].scale(lane, first, next.step);
      s.formats[(product + 1) % 3].fetch_scales(lane, first);
      s.formats[(product + 1) % 3].fetch_scales(lane, place_of(p, (product + 1) % KINDS, next.tile + 1));
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
