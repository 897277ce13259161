// The place of the largest logit of each row, the first of equal ones; the row then stands ready for its next token. A row
// with a logit that is no finite number has no next token: its position becomes -1, as that of a row that is not used, and
// its id 0.

constexpr int AHEAD = 8;   // logits that a thread has on their way

struct Argmax {
  const float* logits;   // [m, vocabulary]
  float* best;           // [m, parts]
  int* place;            // [m, parts]: -1 where a logit is not finite
  u32* arrivals;         // [m], zero between launches
  int* ids;              // [m]: the token; the next step reads it as its input
  int* positions;        // [m]: moved on by one where it is not negative; null: not wanted
  float softcap;         // 0: none; where it rounds two logits to one, the first of them is taken
  int vocabulary;
};

__device__ __forceinline__ void take_better(float& value, int& place, float other, int other_place) {
  if (other > value || (other == value && other_place < place)) value = other, place = other_place;
}

__device__ __forceinline__ void best_of_block(float& value, int& place) {
  __shared__ float values[32];
  __shared__ int places[32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, lanes);
    take_better(value, place, other, __shfl_xor_sync(0xffffffffu, place, lanes));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, places[threadIdx.x / 32] = place;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < blockDim.x / 32; ++w) take_better(value, place, values[w], places[w]);
  }
}

extern "C" __global__ void __launch_bounds__(256) argmax(Argmax p) {
  __shared__ bool is_last;
  const int row = blockIdx.y, parts = gridDim.x;
  float value = MINUS_INFINITY;
  int place = 0x7fffffff, odd = 0;
  next_kernel_may_start();
  previous_kernels_done();
  const float* const logits = p.logits + (size_t)row * p.vocabulary;
#pragma unroll 1
  for (int first = blockIdx.x * 256 + threadIdx.x; first < p.vocabulary; first += AHEAD * parts * 256) {
    float read[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {   // all on their way before the first is looked at
      const int i = first + j * parts * 256;
      read[j] = i < p.vocabulary ? logits[i] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int i = first + j * parts * 256;
      odd |= !(fabsf(read[j]) <= 3.402823466e38f);   // NaN is not
      if (i < p.vocabulary) take_better(value, place, p.softcap > 0.f ? p.softcap * tanhf(read[j] / p.softcap) : read[j], i);
    }
  }
  best_of_block(value, place);
  odd = __syncthreads_or(odd);
  if (threadIdx.x == 0) {
    p.best[row * parts + blockIdx.x] = value, p.place[row * parts + blockIdx.x] = odd ? -1 : place;
    __threadfence();
    is_last = atomicAdd(p.arrivals + row, 1u) == parts - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  value = MINUS_INFINITY, place = 0x7fffffff, odd = 0;
  for (int i = threadIdx.x; i < parts; i += 256) {
    const int of_part = __ldcg(p.place + row * parts + i);
    odd |= of_part < 0;
    take_better(value, place, __ldcg(p.best + row * parts + i), of_part);
  }
  best_of_block(value, place);
  odd = __syncthreads_or(odd);
  if (threadIdx.x == 0) {
    p.ids[row] = !odd && place < p.vocabulary ? place : 0;
    if (p.positions != nullptr && p.positions[row] >= 0) p.positions[row] = odd ? -1 : p.positions[row] + 1;
    p.arrivals[row] = 0;
  }
}
