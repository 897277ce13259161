// What the decode step (step.cu) is given, and what each of its blocks and warps has to do of it.

enum { QKV, O, GATE_UP, DOWN, KINDS };

struct Layer {
  u16* keys;             // [blocks, block size, kv_heads, HEAD_DIM]
  u16* values;
  long long sliding;     // 1: attends to a window
};

struct Step {
  const Format* formats;        // [layers, KINDS]
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
  u32* attended;                // what it gives, [FEW_RUNS, heads * HEAD_DIM],
  u32* shares;                  // of its runs: see Attention
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
constexpr int RING_BYTES = WARPS * BLOCK_STAGES * Format::STAGE_BYTES;

// What a block has of each kind of product: the same in every layer.
struct Share {
  int first_tile, tiles;
  int first_piece;       // which piece of its first tile; it has the first of all others
};
struct WarpShare { int tile, step, count; };

struct Shared {
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
