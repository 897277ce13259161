// Values that blocks of one running launch hand each other through device memory, without a barrier: each says itself
// whether it has come. A word is an fp32 value whose four lowest bits are a tag in place of 2^-20 of its size (of a run's
// weight, whose logarithm is handed over: 6e-5 of itself at scores of 50, which is what soft-caps allow); a place is
// written once a layer, so the tag of this layer cannot be the one that still lies there. A packet has its fp32 value whole
// and 32 bits of tag, for places that are not written every time.

constexpr u32 TAG_MASK = 15;

// threadIdx.x, which the compiler may not know to be the same in every round of a long loop: else it computes the addresses of
// all phases of that loop once and keeps them, in registers that no phase has to spare.
__device__ __forceinline__ int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A wait that never ends would take the GPU with it, so it ends in an error: after some seconds, where all blocks need microseconds.
struct Patience {
  u32 left = SPIN_LIMIT;
  __device__ __forceinline__ void tick() {
    if (--left == 0) __trap();
  }
};

__device__ __forceinline__ u32 as_word(float value, u32 tag) { return (__float_as_uint(value) & ~TAG_MASK) | (tag & TAG_MASK); }
__device__ __forceinline__ float word_value(u32 word) { return __uint_as_float(word & ~TAG_MASK); }
__device__ __forceinline__ void publish(u32* to, float value, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(as_word(value, tag)) : "memory");
}
__device__ __forceinline__ void publish4(u32* to, const float4& v, u32 tag) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(as_word(v.x, tag)), "r"(as_word(v.y, tag)),
               "r"(as_word(v.z, tag)), "r"(as_word(v.w, tag))
               : "memory");
}
__device__ __forceinline__ uint4 load_words(const u32* from) {
  uint4 w;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
  return w;
}
__device__ __forceinline__ bool are_here(const uint4& w, u32 tag) {
  return (((w.x ^ tag) | (w.y ^ tag) | (w.z ^ tag) | (w.w ^ tag)) & TAG_MASK) == 0;
}

// Waits for COUNT fours of words, loaded already, all lanes of the warp together; those that had not come are loaded
// again, all at once.
template <int COUNT, class At>
__device__ __forceinline__ void await_words(uint4 (&w)[COUNT], u32 tag, u32 wanted, At at) {
  Patience patience;
#pragma unroll 1
  while (true) {
    bool waiting = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) waiting |= (wanted >> i & 1) && !are_here(w[i], tag);
    if (!__any_sync(0xffffffffu, waiting)) break;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if ((wanted >> i & 1) && !are_here(w[i], tag)) w[i] = load_words(at(i));
    }
    patience.tick();
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
  Patience patience;
#pragma unroll 1
  for (bool waiting = true; waiting;) {
    waiting = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if ((wanted >> i & 1) && (u32)(w[i] >> 32) != tag) w[i] = load_packet(at(i)), waiting = true;
    }
    patience.tick();
  }
}

// Fours of values.
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
