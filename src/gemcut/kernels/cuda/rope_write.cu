// Rotates the queries and keys of many tokens and writes keys and values to their places in the cache.

struct RopeWrite {
  const u16* qkv;        // bf16 [t, (heads + 2 * kv_heads) * HEAD_DIM]
  u16* query;            // bf16 [t, heads * HEAD_DIM]: normalised where wanted, rotated, scaled
  u16* key;              // bf16 [t, kv_heads * HEAD_DIM]: what goes to `keys`, in order of the rows; null: not wanted
  u16* keys;             // [places, kv_heads, HEAD_DIM]
  u16* values;
  const long long* slots;   // [t]: each token's place; negative: it has none
  const float* rope;     // [t, HEAD_DIM]: each token's cosines, then its sines
  const float* q_norm;   // [HEAD_DIM] or null, k_norm too
  const float* k_norm;
  float scale, eps;
  int heads, kv_heads;
};

constexpr int LANES = HEAD_DIM / 8;

extern "C" __global__ void __launch_bounds__(256) rope_write(RopeWrite p) {
  const size_t row = blockIdx.x;
  const int part = threadIdx.x % LANES, all_heads = p.heads + 2 * p.kv_heads;
  next_kernel_may_start();
  previous_kernels_done();
  const float* const rope = p.rope + row * HEAD_DIM;
  const long long slot = p.slots[row];
  const int heads_up = (all_heads * LANES + 31) / 32 * 32 / LANES;   // whole warps: lanes exchange values
  for (int head = threadIdx.x / LANES; head < heads_up; head += 256 / LANES) {
    const int real = min(head, all_heads - 1);
    const u16* const from = p.qkv + (row * all_heads + real) * HEAD_DIM;
    const bool is_value = real >= p.heads + p.kv_heads, is_key = real >= p.heads;
    float rotated[8];   // of values too, so that a warp's lanes stay together; it is not used
    rotated8<LANES>(from, is_key ? p.k_norm : p.q_norm, p.eps, rope, part, rotated);
    if (is_value) {
      const size_t at = (slot * p.kv_heads + real - p.heads - p.kv_heads) * HEAD_DIM + part * 8;
      if (slot >= 0) *reinterpret_cast<uint4*>(p.values + at) = *reinterpret_cast<const uint4*>(from + part * 8);
    } else if (is_key) {
      const uint4 packed = pack8(rotated);
      if (slot >= 0) *reinterpret_cast<uint4*>(p.keys + (slot * p.kv_heads + real - p.heads) * HEAD_DIM + part * 8) = packed;
      if (p.key != nullptr) *reinterpret_cast<uint4*>(p.key + (row * p.kv_heads + real - p.heads) * HEAD_DIM + part * 8) = packed;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) rotated[i] *= p.scale;
      *reinterpret_cast<uint4*>(p.query + (row * p.heads + real) * HEAD_DIM + part * 8) = pack8(rotated);
    }
  }
}
