// Computes: Hopper's instructions as device functions: mbarrier, TMA loads and stores, wgmma fences, stmatrix
// Shapes: a TMA box is 64 bf16 columns (128 bytes) by some rows, swizzled by 128 bytes; wgmma descriptors describe it
// Runs: linear/gemm.cuh, linear/gated.cu and attention/varlen_hopper.cu, after launch.cuh
// Schedule: the building blocks of producer/consumer warp specialization (PTX ISA: mbarrier, cp.async.bulk, wgmma)
// Invariants: accumulators are read only after wgmma_wait and warpgroup_fence_operand (its name in CUTLASS)

// A tensor map: how TMA finds boxes of a matrix. The driver makes it (cuTensorMapEncodeTiled).
struct alignas(64) TensorMap {
  u8 opaque[128];
};

__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
// After all mbarriers were initialised, before other threads use them.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// One arrival, which is complete when `bytes` of copies have arrived, too.
__device__ __forceinline__ void barrier_expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the mbarrier with the same address in thread block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(u64* barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// The 128 threads of a warpgroup, at a named barrier of their own, from 1 on; __syncthreads() is 0.
__device__ __forceinline__ void warpgroup_sync(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

__device__ __forceinline__ void tma_bulk_load(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, int column, int row, u64* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared_address(to)),
               "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
               : "memory");
}
// To the same address in both thread blocks of a cluster (multicast). Each one's own mbarrier counts the bytes.
__device__ __forceinline__ void tma_load_multicast(void* to, const TensorMap& map, int column, int row, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"((u16)3)
      : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column), "r"(row),
               "r"(shared_address(from))
               : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Keeps the compiler from reading the sums before the wait above this.
template <int COUNT>
__device__ __forceinline__ void warpgroup_fence_operand(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// The descriptor of boxes in shared memory with the 128-byte swizzle: rows of 128 bytes, eight rows every 1024 bytes. `apart`: bytes
// between boxes side by side, for operands that are stored MN-major.
__device__ __forceinline__ u64 wgmma_descriptor(const u8* at, u32 apart = 16) {
  return (u64)((shared_address(at) & 0x3ffff) >> 4) | (u64)(apart >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// 16 x 16 bf16 of a warp, in the layout of its accumulators, to shared memory. Lane l gives the address of half l / 16 of row l % 16.
__device__ __forceinline__ void stmatrix_x4(u32 to, const u32 (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]),
               "r"(pairs[3])
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(u32 from, u32 (&pairs)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ float exp2_approx(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}
