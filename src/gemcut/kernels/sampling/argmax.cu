// Computes: the index of each row's largest logit, the first of equal ones; then the row is ready for its next token
// Shapes: logits fp32 [m, vocabulary] -> ids int32 [m]; positions int32 [m] advance by one
// Runs: sampling/argmax.py; grid [parts of the vocabulary, rows]
// Schedule: two-stage reduction in one launch: the last block of a row to finish reduces the parts
// Invariants: a row with a logit that is not finite gets position -1 and id 0; arrivals are zero between launches

constexpr int AHEAD = 8;   // logits that a thread has in flight

struct Argmax {
  const float* logits;   // [m, vocabulary]
  float* best;           // [m, parts]
  int* index;            // [m, parts]: -1 where a logit is not finite
  u32* arrivals;         // [m], zero between launches
  int* ids;              // [m]: the token; the next step reads it as its input
  int* positions;        // [m]: moved on by one where it is not negative; null: not wanted
  float softcap;         // 0: none; where it rounds two logits to one, the first of them is taken
  int vocabulary;
};

__device__ __forceinline__ void take_better(float& value, int& index, float other, int other_index) {
  if (other > value || (other == value && other_index < index)) value = other, index = other_index;
}

__device__ __forceinline__ void best_of_block(float& value, int& index) {
  __shared__ float values[32];
  __shared__ int indices[32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, lanes);
    take_better(value, index, other, __shfl_xor_sync(0xffffffffu, index, lanes));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, indices[threadIdx.x / 32] = index;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < blockDim.x / 32; ++w) take_better(value, index, values[w], indices[w]);
  }
}

extern "C" __global__ void __launch_bounds__(256) argmax(Argmax p) {
  __shared__ bool is_last;
  const int row = blockIdx.y, parts = gridDim.x;
  float value = MINUS_INFINITY;
  int index = 0x7fffffff, not_finite = 0;
  next_kernel_may_start();
  previous_kernels_done();
  const float* const logits = p.logits + (size_t)row * p.vocabulary;
#pragma unroll 1
  for (int first = blockIdx.x * 256 + threadIdx.x; first < p.vocabulary; first += AHEAD * parts * 256) {
    float read[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {   // all in flight before the first is used
      const int i = first + j * parts * 256;
      read[j] = i < p.vocabulary ? logits[i] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int i = first + j * parts * 256;
      not_finite |= !(fabsf(read[j]) <= 3.402823466e38f);   // NaN is not
      if (i < p.vocabulary) take_better(value, index, p.softcap > 0.f ? p.softcap * tanhf(read[j] / p.softcap) : read[j], i);
    }
  }
  best_of_block(value, index);
  not_finite = __syncthreads_or(not_finite);
  if (threadIdx.x == 0) {
    p.best[row * parts + blockIdx.x] = value, p.index[row * parts + blockIdx.x] = not_finite ? -1 : index;
    __threadfence();
    is_last = atomicAdd(p.arrivals + row, 1u) == parts - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  value = MINUS_INFINITY, index = 0x7fffffff, not_finite = 0;
  for (int i = threadIdx.x; i < parts; i += 256) {
    const int of_part = __ldcg(p.index + row * parts + i);
    not_finite |= of_part < 0;
    take_better(value, index, __ldcg(p.best + row * parts + i), of_part);
  }
  best_of_block(value, index);
  not_finite = __syncthreads_or(not_finite);
  if (threadIdx.x == 0) {
    p.ids[row] = !not_finite && index < p.vocabulary ? index : 0;
    if (p.positions != nullptr && p.positions[row] >= 0) p.positions[row] = not_finite ? -1 : p.positions[row] + 1;
    p.arrivals[row] = 0;
  }
}
