// Computes: values that the blocks of one running launch hand each other through device memory, without a barrier
// Shapes: a flagged word: fp32 whose four lowest bits are a flag; a packet: fp32 and a 32-bit flag in one u64
// Runs: every file of the megakernel; a warp waits for its words together, the block goes on when they are there
// Schedule: flag-in-data, as in NCCL's LL protocol; relaxed loads and stores at GPU scope
// Invariants: a word is written once a layer, so an old value never has this layer's flag; a wait ends in a trap
//
// The flag of a word costs 2^-20 of its size (of a split's weight, whose logarithm is handed over: 6e-5 of itself at scores of 50,
// which is what soft-caps allow). A packet has its fp32 value whole, for slots that are not written every time.

constexpr u32 TAG_MASK = 15;

// threadIdx.x, read so that the compiler does not know it to be the same in every round of a long loop. Else it would compute the
// addresses of all phases of that loop once and keep them, in registers that no phase has to spare.
__device__ __forceinline__ int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A wait that never ends would hang the GPU, so it ends in a trap: after some seconds, where all blocks need microseconds.
struct SpinGuard {
  u32 left = SPIN_LIMIT;
  __device__ __forceinline__ void tick() {
    if (--left == 0) __trap();
  }
};

__device__ __forceinline__ u32 flagged_word(float value, u32 tag) { return (__float_as_uint(value) & ~TAG_MASK) | (tag & TAG_MASK); }
__device__ __forceinline__ float word_value(u32 word) { return __uint_as_float(word & ~TAG_MASK); }
__device__ __forceinline__ void publish(u32* to, float value, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(flagged_word(value, tag)) : "memory");
}
__device__ __forceinline__ void publish4(u32* to, const float4& v, u32 tag) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(flagged_word(v.x, tag)), "r"(flagged_word(v.y, tag)),
               "r"(flagged_word(v.z, tag)), "r"(flagged_word(v.w, tag))
               : "memory");
}
__device__ __forceinline__ uint4 load_words(const u32* from) {
  uint4 w;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
  return w;
}
__device__ __forceinline__ bool have_arrived(const uint4& w, u32 tag) {
  return (((w.x ^ tag) | (w.y ^ tag) | (w.z ^ tag) | (w.w ^ tag)) & TAG_MASK) == 0;
}

// Waits for COUNT uint4s of words, loaded already, all lanes of the warp together. Those that had not arrived are loaded
// again, all at once.
template <int COUNT, class At>
__device__ __forceinline__ void await_words(uint4 (&w)[COUNT], u32 tag, u32 wanted, At at) {
  SpinGuard guard;
#pragma unroll 1
  while (true) {
    bool waiting = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) waiting |= (wanted >> i & 1) && !have_arrived(w[i], tag);
    if (!__any_sync(0xffffffffu, waiting)) break;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if ((wanted >> i & 1) && !have_arrived(w[i], tag)) w[i] = load_words(at(i));
    }
    guard.tick();
  }
}

__device__ __forceinline__ void publish_packet(u64* to, float value, u32 tag) {
  const u64 packet = (u64)tag << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(packet) : "memory");
}
__device__ __forceinline__ u64 load_packet(const u64* from) {
  u64 packet;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(packet) : "l"(from) : "memory");
  return packet;
}
__device__ __forceinline__ float packet_value(u64 packet) { return __uint_as_float((u32)packet); }

template <int COUNT, class At>
__device__ __forceinline__ void await_packets(u64 (&w)[COUNT], u32 tag, u32 wanted, At at) {
  SpinGuard guard;
#pragma unroll 1
  for (bool waiting = true; waiting;) {
    waiting = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if ((wanted >> i & 1) && (u32)(w[i] >> 32) != tag) w[i] = load_packet(at(i)), waiting = true;
    }
    guard.tick();
  }
}

// Four values at a time.
__device__ __forceinline__ float4 read4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float4 value4(const uint4& w) {
  return make_float4(word_value(w.x), word_value(w.y), word_value(w.z), word_value(w.w));
}
__device__ __forceinline__ float dot4(const float4& a, const float4& b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ __forceinline__ float4 multiply4(const float4& a, const float4& b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ __forceinline__ float4 scaled4(const float4& a, float s) { return make_float4(a.x * s, a.y * s, a.z * s, a.w * s); }
__device__ __forceinline__ uint2 pack4(const float4& v) { return make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)); }
