// Computes: RMSNorm (arXiv 1910.07467) and the residual stream: embedding, and a sublayer's way back with the next norm
// Shapes: residual fp32 [m, d]; y, x bf16 [m, d]; post, pre fp32 [d]; table bf16 or int8 [vocabulary, d]; ids [m]
// Runs: rowwise/norm.py; one block a row, eight values a thread, d at most 8192
// Schedule: fused rowwise reduction: one pass over the row, held in registers
// Invariants: fp32 throughout; x is rounded to bf16 once; residual is updated in place
//
//   residual = embedding row * scale          (norm_embed)
//   residual = residual + rms(y) * post       (norm_add; y null: nothing is added)
//   x        = rms(residual) * pre            (both: the next sublayer's input, bf16; x null: not computed)

struct Norm {
  const u16* y;          // norm_add: bf16 [m, d] or null
  float* residual;       // [m, d]
  const float* post;     // [d]
  const float* pre;      // [d]
  void* x;               // bf16 [m, d] or null; with `groups`, in the layout of layout.cuh
  const int* ids;        // norm_embed: [m]
  const u8* table;       // norm_embed: bf16 or int8 [vocabulary, d]
  const float* absmax;   // int8 tables: [vocabulary]
  float embed_scale, eps;
  int d, groups;
};

__device__ __forceinline__ void write_normed(const Norm& p, const float (&residual)[8], const float (&pre)[8], bool mine, size_t at,
                                             float* scratch) {
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += residual[i] * residual[i];
  const float scale = rsqrtf(block_sum(squares, scratch) / p.d + p.eps);
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = residual[i] * scale * pre[i];
  // Threads past the row's end hold zeros: the layout's padding.
  if (p.groups > 0) store_ordered(static_cast<u32*>(p.x), p.groups, blockIdx.x, threadIdx.x * 8, pack8(x));
  else if (mine) *reinterpret_cast<uint4*>(static_cast<u16*>(p.x) + at) = pack8(x);
}

extern "C" __global__ void __launch_bounds__(1024) norm_add(Norm p) {
  __shared__ float scratch[2][32];
  const int column = threadIdx.x * 8;
  const size_t at = (size_t)blockIdx.x * p.d + column;
  const bool mine = column < p.d;
  float post[8] = {}, pre[8] = {}, residual[8] = {}, y[8] = {};
  if (mine && p.y != nullptr) load8(p.post + column, post);
  if (mine && p.x != nullptr) load8(p.pre + column, pre);
  next_kernel_may_start();
  previous_kernels_done();
  if (mine) load8(p.residual + at, residual);
  if (p.y != nullptr) {
    if (mine) unpack8(*reinterpret_cast<const uint4*>(p.y + at), y);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += y[i] * y[i];
    const float scale = rsqrtf(block_sum(squares, scratch[0]) / p.d + p.eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) residual[i] += y[i] * scale * post[i];
    if (mine) store8(p.residual + at, residual);
  }
  if (p.x != nullptr) write_normed(p, residual, pre, mine, at, scratch[1]);
}

extern "C" __global__ void __launch_bounds__(1024) norm_embed(Norm p) {
  __shared__ float scratch[32];
  const int column = threadIdx.x * 8;
  const size_t at = (size_t)blockIdx.x * p.d + column;
  const bool mine = column < p.d;
  float pre[8] = {}, residual[8] = {};
  if (mine) load8(p.pre + column, pre);
  next_kernel_may_start();
  previous_kernels_done();
  const size_t row = p.ids[blockIdx.x];
  if (mine && p.absmax == nullptr) {
    unpack8(*reinterpret_cast<const uint4*>(p.table + (row * p.d + column) * 2), residual);
  } else if (mine) {
    const uint2 packed = *reinterpret_cast<const uint2*>(p.table + row * p.d + column);
    const float unit = __fdiv_rn(p.absmax[row], 127.f);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {   // rounded to bf16 once, as the plain embedding is
      const u32 word = i < 4 ? packed.x : packed.y;
      const float low = (float)(signed char)(word >> (i % 4 * 8)), high = (float)(signed char)(word >> (i % 4 * 8 + 8));
      const u32 pair = pack_bf16(low * unit, high * unit);
      residual[i] = low_bf16(pair), residual[i + 1] = high_bf16(pair);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) residual[i] *= p.embed_scale;
  if (mine) store8(p.residual + at, residual);
  write_normed(p, residual, pre, mine, at, scratch);
}
