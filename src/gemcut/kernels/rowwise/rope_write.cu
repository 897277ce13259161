// Computes: rotation of many tokens' queries and keys, and the write of keys and values into the paged cache
// Shapes: qkv bf16 [t, (heads + 2 kv_heads) D] -> query [t, heads D], key [t, kv_heads D]; cache [slots, kv_heads, D]
// Runs: rowwise/rope_write.py in prefill; one block a token, LANES lanes a head
// Schedule: elementwise; the next head is loaded while this one is rotated; partners exchange by warp shuffle
// Invariants: a negative slot: nothing is written to the cache; values are copied as they are

struct RopeWrite {
  const u16* qkv;        // bf16 [t, (heads + 2 * kv_heads) * HEAD_DIM]
  u16* query;            // bf16 [t, heads * HEAD_DIM]: normalised where wanted, rotated, scaled
  u16* key;              // bf16 [t, kv_heads * HEAD_DIM]: what goes to `keys`, in order of the rows; null: not wanted
  u16* keys;             // [slots, kv_heads, HEAD_DIM]
  u16* values;
  const long long* slots;   // [t]: each token's slot in the cache; negative: it has none
  const float* rope;     // [t, HEAD_DIM]: each token's cosines, then its sines
  const float* q_norm;   // [HEAD_DIM] or null, k_norm too
  const float* k_norm;
  float scale, eps;
  int heads, kv_heads;
};

constexpr int LANES = HEAD_DIM / 8, TOGETHER = 256 / LANES;   // heads

extern "C" __global__ void __launch_bounds__(256) rope_write(RopeWrite p) {
  const size_t row = blockIdx.x;
  const int part = threadIdx.x % LANES, all_heads = p.heads + 2 * p.kv_heads;
  const int heads_up = (all_heads * LANES + 31) / 32 * 32 / LANES;   // whole warps: lanes exchange values
  int head = threadIdx.x / LANES;
  auto read = [&](int of) {
    const u16* const from = p.qkv + (row * all_heads + min(of, all_heads - 1)) * HEAD_DIM + part * 8;
    return __ldcs(reinterpret_cast<const uint4*>(from));
  };
  next_kernel_may_start();
  previous_kernels_done();
  uint4 next = read(head);
  float cosine[8], sine[8];
  load_angles<LANES>(p.rope + row * HEAD_DIM, part, cosine, sine);
  const long long slot = p.slots[row];
  for (; head < heads_up; head += TOGETHER) {
    const uint4 own = next;
    if (head + TOGETHER < heads_up) next = read(head + TOGETHER);   // loaded while this one is rotated and stored
    uint4 partner;
    partner.x = __shfl_xor_sync(0xffffffffu, own.x, LANES / 2), partner.y = __shfl_xor_sync(0xffffffffu, own.y, LANES / 2);
    partner.z = __shfl_xor_sync(0xffffffffu, own.z, LANES / 2), partner.w = __shfl_xor_sync(0xffffffffu, own.w, LANES / 2);
    const int real = min(head, all_heads - 1);
    const bool is_value = real >= p.heads + p.kv_heads, is_key = real >= p.heads;
    float mine[8], others[8], rotated[8];   // of values too, so that a warp's lanes stay together; it is not used
    unpack8(own, mine);
    unpack8(partner, others);
    rotate8<LANES>(mine, others, is_key ? p.k_norm : p.q_norm, p.eps, cosine, sine, part, rotated);
    if (is_value) {
      const size_t at = (slot * p.kv_heads + real - p.heads - p.kv_heads) * HEAD_DIM + part * 8;
      if (slot >= 0) *reinterpret_cast<uint4*>(p.values + at) = own;
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
