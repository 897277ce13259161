// Computes: what decode_step.cu is given (struct Step), and which part of each GEMV its blocks and warps have
// Shapes: weights [tiles of 16 rows, k_blocks]; a unit is what a block takes whole: a tile, a gate/up pair or a stage
// Runs: every block of decode_step.cu, once a launch (split_work); megakernel/decode_step.py plans with the same rule
// Schedule: Stream-K (arXiv 2301.03598): stages are split evenly and contiguously over blocks, then over warps
// Invariants: the same split in every layer; every block has a part of every GEMV

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
  u32* qkv;                     // flagged words, each written once a layer: what attention reads,
  u32* attended;                // what it gives, [FEW_SPLITS, heads * HEAD_DIM],
  u32* lse;                     // of its splits: see Attention
  u32* activated;               // gelu(gate) * up,
  u32* partials[2];             // [PARTIALS, hidden]: partial sums of o and of down, added to the residual stream
  u64* partial;                 // packets (LL): see Attention
  float* residual;              // [blocks, hidden]
  u32* epoch;                   // how many layers were ever computed with these words
  u16* x;                       // bf16 [hidden]: the result, normalised for the head
  float embed_scale, eps, scale, softcap;
  int layer_count, hidden, kv_heads, block_shift, x_bytes;
  int windows[2];
  int tiles[KINDS], k_blocks[KINDS];
};

constexpr int THREADS = WARPS * 32;
constexpr int RING_BYTES = WARPS * BLOCK_STAGES * Format::STAGE_BYTES;

// What a block has of each kind of GEMV: the same in every layer.
struct BlockWork {
  int first_tile, tiles;
  int first_partial;     // which partial sum of its first tile is its own; of all other tiles it has the first
};
struct WarpWork { int tile, k_block, count; };

struct Shared {
  BlockWork work[KINDS];
  WarpWork warps[KINDS][WARPS];
  u16 owners[KINDS][MOST_TILES];        // a bit for each warp that has a part of the tile
  float warp_sums[WARPS][SLOTS][TILE];  // of each warp: sums of its last tiles
  float4 sums[WARPS];
  Split splits[2];                      // of layers that attend to the whole context; of those that slide
};

__device__ __forceinline__ u32 units_of(const Step& p, int kind) {
  return kind == QKV ? p.tiles[kind] : kind == GATE_UP ? p.tiles[kind] / 2 : p.tiles[kind] * p.k_blocks[kind];
}
// Gate and up stand one below the other in W. Their tiles are computed in turns, so that both halves of a value are in one block.
__device__ __forceinline__ int weight_tile(const Step& p, int kind, int tile) {
  return kind == GATE_UP ? (tile & 1) * (p.tiles[kind] / 2) + (tile >> 1) : tile;
}

__device__ __forceinline__ void split_work(const Step& p, Shared& s) {
  constexpr int EACH = WARPS + MOST_TILES;
#pragma unroll 1
  for (int i = threadIdx.x; i < KINDS * EACH; i += THREADS) {   // of each kind: its warps, then its tiles
    const int kind = i / EACH, slot = i % EACH;
    const u32 units = units_of(p, kind), k_blocks = p.k_blocks[kind], stages = p.tiles[kind] * k_blocks, unit = stages / units;
    const u32 begin = blockIdx.x * units / gridDim.x * unit, end = (blockIdx.x + 1) * units / gridDim.x * unit;
    const u32 total = end - begin, first = begin / k_blocks, count = (end - 1) / k_blocks - first + 1;
    if (slot < WARPS) {
      const u32 from = begin + slot * total / WARPS, to = begin + (slot + 1) * total / WARPS;
      s.warps[kind][slot] = {(int)(from / k_blocks), (int)(from % k_blocks), (int)(to - from)};
      if (slot == 0) {
        s.work[kind] = {(int)first, (int)count, unit > 1 ? 0 : (int)(blockIdx.x - split_owner(first * k_blocks, units, gridDim.x))};
      }
    } else if (slot - WARPS < count) {
      const u32 tile = first + slot - WARPS, start = max(tile * k_blocks, begin) - begin, stop = min((tile + 1) * k_blocks, end) - begin;
      u32 owners = 0;
#pragma unroll
      for (u32 w = 0; w < WARPS; ++w) {
        const u32 from = max(split_begin(w, total, WARPS), start), to = min(split_begin(w + 1, total, WARPS), stop);
        owners |= (from < to) << w;
      }
      s.owners[kind][slot - WARPS] = owners;
    }
  }
}
