// Computes: rotary embedding (RoPE, arXiv 2104.09864) of a head, after its norm where there is one (Gemma 3)
// Shapes: eight neighbouring values a lane; LANES lanes hold a whole head; rope [cosines, then sines], 4 * LANES each
// Runs: rowwise/rope_write.cu, attention/decode.cu and the megakernel
// Schedule: elementwise in registers; pairs are (i, i + half of the head), exchanged between lanes or read twice
// Invariants: a normalised value is rounded to bf16 before it is rotated; all lanes of a head take part

template <int LANES>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Of one position: the cosines, then the sines, each [4 * LANES]. Pairs are (i, i + half of the head).
template <int LANES>
__device__ __forceinline__ void load_angles(const float* rope, int part, float (&cosine)[8], float (&sine)[8]) {
  constexpr int HALF = LANES / 2;
  const int pair = part & (HALF - 1);
  load8(rope + pair * 8, cosine);
  load8(rope + (HALF + pair) * 8, sine);
}

// `own` and `other` are the lane's eight values and those half a head away. `weight` null: no norm.
template <int LANES>
__device__ __forceinline__ void rotate8(float (&own)[8], float (&other)[8], const float* weight, float eps, const float (&cosine)[8],
                                        const float (&sine)[8], int part, float (&to)[8]) {
  constexpr int HALF = LANES / 2;
  const int partner = part ^ HALF;
  if (weight != nullptr) {
    float squares = 0.f, w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += own[i] * own[i];
    const float scale = rsqrtf(sum_lanes<LANES>(squares) / (LANES * 8) + eps);
    load8(weight + part * 8, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) own[i] *= scale * w[i];
    unpack8(pack8(own), own);
    load8(weight + partner * 8, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) other[i] *= scale * w[i];
    unpack8(pack8(other), other);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = own[i] * cosine[i] + (part < HALF ? -other[i] : other[i]) * sine[i];
}

// The same from memory: `head` is bf16 [8 * LANES], `rope` as load_angles wants it.
template <int LANES>
__device__ __forceinline__ void rotated8(const u16* head, const float* weight, float eps, const float* rope, int part, float (&to)[8]) {
  const int partner = part ^ LANES / 2;
  float own[8], other[8], cosine[8], sine[8];
  unpack8(*reinterpret_cast<const uint4*>(head + part * 8), own);
  unpack8(*reinterpret_cast<const uint4*>(head + partner * 8), other);
  load_angles<LANES>(rope, part, cosine, sine);
  rotate8<LANES>(own, other, weight, eps, cosine, sine, part, to);
}
