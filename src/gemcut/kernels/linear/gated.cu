// Computes: gelu(gate) * up for many rows, gate = x G^T and up = x U^T (GEGLU, arXiv 2002.05202) in one launch
// Shapes: x bf16 [m, k]; W bf16 [2 width, k], the rows of G, then of U; out bf16 [m, width]; sums fp32
// Runs: linear/gated.py on Hopper, a cluster of two thread blocks for 256 rows of x by 128 columns
// Schedule: persistent, warp-specialized ping-pong (CUTLASS 3): a TMA producer, two wgmma consumers, multicast
// Invariants: gate and up stay in registers; one rounding, in the epilogue; TMA leaves out what is beyond the edges
//
// Each block of the cluster has half of the rows. Blocks of 64 columns of x and W come through tensor maps, in the form that wgmma
// reads. Each block fetches its own rows of x. One of them fetches the 128 rows of G, the other those of U, and the TMA unit
// delivers them to both (multicast). Two consumer warpgroups multiply 64 rows each by all 256 rows of W, so that a thread's sums
// hold gate and up of the same columns. Results leave through the TMA unit, too.
//
// The second consumer warpgroup begins two blocks of columns behind the first, so that one has the matrix units for itself while
// the other computes its epilogue. Clusters walk through the tiles in bands of GROUP * 256 rows of x and, every other tile,
// backwards through the columns: what L2 saw last is used first.
//
// launch.cuh, hopper.cuh and the generated wgmma() stand before this file.

constexpr int ROWS = 128, COLUMNS = 128, K_BLOCK = 64, STAGES = 4;       // of x a block; of the result; of x and W at a time
constexpr int GROUP = 8;
constexpr int BOX_BYTES = 128 * K_BLOCK * 2, STAGE_BYTES = 3 * BOX_BYTES; // x, G, U
constexpr int RESULT_BYTES = 64 * COLUMNS * 2;                         // of a warpgroup
constexpr int WARPS = 8;                                               // consumers

struct Tiles {
  int m_pairs, n_tiles, k_blocks;   // 256 rows of x, 128 columns of the result, 64 columns of x and W each
  int width;                     // rows of G
};

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
constexpr int BOTH = 3;   // the named barrier of both consumer warpgroups; 1 and 2 are their own

// gelu(gate) * up: 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) (g + 0.044715 g^3), right at both ends.
__device__ __forceinline__ float gated(float gate, float up) {
  constexpr float LINEAR = -2.3022082f, CUBIC = -0.10294324f;   // of -2 u / log(2)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + exp2_approx(gate * (LINEAR + CUBIC * (gate * gate)))));
  return gate * inverse * up;
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    gated_gemm(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap out, const Tiles p) {
  extern __shared__ __align__(1024) u8 shared[];
  u8* const results = shared + STAGES * STAGE_BYTES;
  u64* const full = reinterpret_cast<u64*>(results + 2 * RESULT_BYTES);
  u64* const empty = full + STAGES;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    // A stage is free when both thread blocks have used it: either one's W goes to both.
    for (int i = 0; i < STAGES; ++i) barrier_init(full + i, 1), barrier_init(empty + i, 2 * WARPS);
    barrier_init_fence();
  }
  cluster_sync();
  previous_kernels_done();

  const int tiles = p.m_pairs * p.n_tiles, first_tile = blockIdx.x / 2, clusters = gridDim.x / 2;
  auto tile_origin = [&](int tile, int& row, int& column) {   // of the thread block's part of the result
    const int band = tile / (GROUP * p.n_tiles), within = tile % (GROUP * p.n_tiles), pairs = min(GROUP, p.m_pairs - band * GROUP);
    row = ((band * GROUP + within % pairs) * 2 + rank) * ROWS, column = within / pairs * COLUMNS;
  };
  int slot = 0;
  u32 phase = 0;
  auto next_slot = [&] {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  };

  if (warpgroup == 0) {   // the producer: loads x and W
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      bool backwards = false;
      for (int tile = first_tile; tile < tiles; tile += clusters, backwards = !backwards) {
        int row, column;
        tile_origin(tile, row, column);
        const int w_row = column + rank * p.width;
#pragma unroll 1
        for (int k_block = 0; k_block < p.k_blocks; ++k_block) {
          u8* const stage = shared + slot * STAGE_BYTES;
          const int from = (backwards ? p.k_blocks - 1 - k_block : k_block) * K_BLOCK;
          barrier_wait(empty + slot, phase ^ 1);
          barrier_expect_bytes(full + slot, STAGE_BYTES);
          tma_load(stage, x, from, row, full + slot);
          tma_load_multicast(stage + (1 + rank) * BOX_BYTES, w, from, w_row, full + slot);
          next_slot();
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int half = warpgroup - 1, warp = threadIdx.x / 32 % 4;
    const bool stores = threadIdx.x % 128 == 0;
    u8* const result = results + half * RESULT_BYTES;
    const int lead = min(2, p.k_blocks - 1);
    if (half == 1) asm volatile("bar.sync %0, 256;" ::"n"(BOTH) : "memory");
    for (int tile = first_tile; tile < tiles; tile += clusters) {
      float sum[COLUMNS];   // of 64 x 128 gates, then of as many ups
      int before = 0;
      auto release = [&] {
        if (lane < 2) barrier_arrive(empty + before, lane);
      };
      for (int k_block = 0; k_block < p.k_blocks; ++k_block) {
        const u8* const stage = shared + slot * STAGE_BYTES;
        barrier_wait(full + slot, phase);
        const u64 a = wgmma_descriptor(stage + half * (64 * K_BLOCK * 2)), b = wgmma_descriptor(stage + BOX_BYTES);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < K_BLOCK / 16; ++i) wgmma(sum, a + i * 2, b + i * 2, k_block > 0 || i > 0);
        wgmma_commit();
        if (k_block > 0) {
          wgmma_wait<1>();
          release();
        }
        if (half == 0 && k_block == lead && tile == first_tile) asm volatile("bar.arrive %0, 256;" ::"n"(BOTH) : "memory");
        before = slot;
        next_slot();
      }
      wgmma_wait<0>();
      warpgroup_fence_operand(sum);
      release();

      if (stores) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");   // the result before has been read
      warpgroup_sync(warpgroup);
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j += 2) {   // 16 rows and 16 columns of each warp
        u32 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const gate = sum + j * 4 + i * 2;
          const float* const up = gate + COLUMNS / 2;
          pairs[i] = pack_bf16(gated(gate[0], up[0]), gated(gate[1], up[1]));
        }
        const int row = warp * 16 + lane % 16, word = j + lane / 16;
        const u32 to = shared_address(result) + word / 8 * (RESULT_BYTES / 2) + row * 128 + (word % 8 ^ row % 8) * 16;
        stmatrix_x4(to, pairs);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      warpgroup_sync(warpgroup);
      if (stores) {
        int row, column;
        tile_origin(tile, row, column);
        tma_store(out, column, row + half * 64, result);
        tma_store(out, column + 64, row + half * 64, result + RESULT_BYTES / 2);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
    if (stores) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  cluster_sync();   // neither leaves while the other may still arrive at its barriers or write to its stages
}
