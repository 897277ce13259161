// Computes: the x of a GEMV from other blocks' words: the residual stream and its norms, or a plain gather
// Shapes: residual fp32 [hidden] a block; x bf16 [columns] in shared memory; partials: flagged words [PARTIALS, hidden]
// Runs: all threads of every block of decode_step.cu
// Schedule: every block computes every norm itself, redundantly, so that there is no barrier over the grid
// Invariants: the same order of sums in every block: all have the same residual stream, bit for bit

// Four sums over the block at once. `scratch` holds one float4 a warp.
__device__ __forceinline__ float4 block_sums(const float4& v, float4* scratch) {
  __syncwarp();   // lanes leave a wait one by one; a shuffle in a diverged warp costs a hundred cycles
  const int thread = this_thread(), lane = thread % 32;
  float parts[4] = {v.x, v.y, v.z, v.w};
  reduce_scatter<16, 1>(parts, lane);
  if (lane % 8 == 0) reinterpret_cast<float*>(scratch + thread / 32)[lane / 8] = parts[0];
  __syncthreads();
  float4 sum = scratch[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) {
    const float4 other = scratch[w];
    sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
  }
  return sum;
}

// A thread's float4s of a row of the residual stream.
struct Residual {
  float4 v[HIDDEN_FLOAT4S] = {};
};
__device__ __forceinline__ int column_of(int thread, int i) { return (thread + i * THREADS) * 4; }

// The embedding of the token, in residual and, normalised, in x.
__device__ __forceinline__ void embed(const Step& p, Shared& s, u8* xs, float* residual) {
  const int thread = this_thread();
  const size_t row = p.ids[0];
  Residual r;
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < HIDDEN_FLOAT4S; ++i) {
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
  for (int i = 0; i < HIDDEN_FLOAT4S; ++i) {
    const int column = column_of(thread, i);
    if (column < p.hidden) *reinterpret_cast<uint2*>(xs + column * 2) = pack4(scaled4(multiply4(r.v[i], read4(p.norms + column)), scale));
  }
}

// residual += rms(y) * norm[0] for the sum y of the partials; x = rms(residual) * norm[1]. `more` has, four bits for each of a
// thread's float4s, how many partials there are beyond the first.
__device__ __forceinline__ void add_norm(const Step& p, Shared& s, u8* xs, float* residual, const u32* partials, u32 more, const float* norm,
                                       u32 tag) {
  const int thread = this_thread();
  Residual r, post, pre, y;
  uint4 words[2 * HIDDEN_FLOAT4S] = {};
  u32 wanted = 0;
  auto at = [&](int i) { return partials + (i & 1) * p.hidden + column_of(thread, i / 2); };
#pragma unroll
  for (int i = 0; i < HIDDEN_FLOAT4S; ++i) {
    const int column = column_of(thread, i);
    if (column >= p.hidden) continue;
    wanted |= ((more >> 4 * i & 15) > 0 ? 3 : 1) << 2 * i;
    words[2 * i] = load_words(at(2 * i));
    if (more >> 4 * i & 15) words[2 * i + 1] = load_words(at(2 * i + 1));
    r.v[i] = read4(residual + column), post.v[i] = read4(norm + column), pre.v[i] = read4(norm + p.hidden + column);
  }
  await_words(words, tag, wanted, at);
  // With t = y * norm[0] and f the norm's factor, the new residual's squares are r.r + 2 f r.t + f f t.t: one round of sums.
  float4 sums = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < HIDDEN_FLOAT4S; ++i) {
    if (column_of(thread, i) >= p.hidden) continue;
    y.v[i] = value4(words[2 * i]);
    const int count = more >> 4 * i & 15;
#pragma unroll 1
    for (int partial = 1; partial <= count; ++partial) {
      uint4 other[1] = {words[2 * i + 1]};
      if (partial > 1) {
        auto there = [&](int) { return partials + partial * p.hidden + column_of(thread, i); };
        SpinGuard guard;
        do {
          other[0] = load_words(there(0));
          guard.tick();
        } while (!have_arrived(other[0], tag));
      }
      const float4 v = value4(other[0]);
      y.v[i] = make_float4(y.v[i].x + v.x, y.v[i].y + v.y, y.v[i].z + v.z, y.v[i].w + v.w);
    }
    sums.x += dot4(y.v[i], y.v[i]);
    y.v[i] = multiply4(y.v[i], post.v[i]);
    sums.y += dot4(r.v[i], r.v[i]), sums.z += dot4(r.v[i], y.v[i]), sums.w += dot4(y.v[i], y.v[i]);
  }
  sums = block_sums(sums, s.sums);
  const float factor = rsqrtf(sums.x / p.hidden + p.eps);
  const float squares = fmaxf(sums.y + 2.f * factor * sums.z + factor * factor * sums.w, 0.f);
  const float scale = rsqrtf(squares / p.hidden + p.eps);
#pragma unroll
  for (int i = 0; i < HIDDEN_FLOAT4S; ++i) {
    const int column = column_of(thread, i);
    if (column >= p.hidden) continue;
    const float4 t = scaled4(y.v[i], factor);
    r.v[i] = make_float4(r.v[i].x + t.x, r.v[i].y + t.y, r.v[i].z + t.z, r.v[i].w + t.w);
    *reinterpret_cast<float4*>(residual + column) = r.v[i];
    *reinterpret_cast<uint2*>(xs + column * 2) = pack4(scaled4(multiply4(r.v[i], pre.v[i]), scale));
  }
}

// x = `count` flagged words, rounded to bf16.
__device__ __forceinline__ void gather(u8* xs, const u32* from, int count, u32 tag) {
  constexpr int BATCH = WIDTH_FLOAT4S;
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
    await_words(words, tag, wanted, at);
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
