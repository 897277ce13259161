// Rotates the queries and keys of many tokens and writes keys and values to their places in the cache.

struct RopeWrite {
  const u16* qkv;        // bf16 [t, (heads + 2 * kv_heads) * HEAD_DIM]
  u16* query;            // bf16 [t, heads * HEAD_DIM]: normalised where wanted, rotated, scaled
  u16* keys;             // [places, kv_heads, HEAD_DIM]
  u16* values;
  const long long* slots;      // [t]: each token's place
  const long long* positions;  // [t]
  const float* rope;     // [positions, HEAD_DIM]
  const float* q_norm;   // [HEAD_DIM] or null, k_norm too
  const float* k_norm;
  float scale, eps;
  int heads, kv_heads;
};

constexpr int LANES = HEAD_DIM / 8;

extern "C" __global__ void __launch_bounds__(256) rope_write(RopeWrite p) {
  const int row = blockIdx.x, part = threadIdx.x % LANES, all_heads = p.heads + 2 * p.kv_heads;
  previous_kernels_done();
  next_kernel_may_start();
  const float* const rope = p.rope + (size_t)p.positions[row] * HEAD_DIM;
  const size_t slot = p.slots[row];
  const int heads_up = (all_heads * LANES + 31) / 32 * 32 / LANES;   // whole warps: lanes exchange values
  for (int head = threadIdx.x / LANES; head < heads_up; head += 256 / LANES) {
    const int real = min(head, all_heads - 1);
    const u16* const from = p.qkv + ((size_t)row * all_heads + real) * HEAD_DIM;
    const bool is_value = real >= p.heads + p.kv_heads, is_key = real >= p.heads;
    float rotated[8];   // of values too, so that a warp's lanes stay together; it is not used
    rotated8<LANES>(from, is_key ? p.k_norm : p.q_norm, p.eps, rope, part, rotated);
    if (is_value) {
      const size_t at = (slot * p.kv_heads + real - p.heads - p.kv_heads) * HEAD_DIM + part * 8;
      *reinterpret_cast<uint4*>(p.values + at) = *reinterpret_cast<const uint4*>(from + part * 8);
      continue;
    }
    if (!is_key) {
#pragma unroll
      for (int i = 0; i < 8; ++i) rotated[i] *= p.scale;
    }
    u16* const to = is_key ? p.keys + (slot * p.kv_heads + real - p.heads) * HEAD_DIM : p.query + ((size_t)row * p.heads + real) * HEAD_DIM;
    *reinterpret_cast<uint4*>(to + part * 8) = pack8(rotated);
  }
}
