// gelu(x G^T) * (x U^T) for many rows of x, bf16, in one launch: the MLP's two products of the same x, summed in fp32, and
// the gated product, rounded once. W [2 width, k] holds the rows of G, then those of U.
//
// A cluster of two thread blocks computes 256 rows of x by 128 columns of the result at a time, each block half of the rows.
// Blocks of 64 columns of x and W come through tensor maps, in the form that wgmma reads: each block fetches its own rows of
// x; one of them fetches the 128 rows of G, the other those of U, and the copy engine delivers them to both. Two warpgroups
// multiply 64 rows each by all 256 rows of W, so that a thread's sums hold gate and up of the same places, and neither is
// stored. One warpgroup does nothing but ask for x and W. Results leave through the copy engine, too, which leaves out what
// lies beyond the edges.
//
// The second multiplying warpgroup begins two blocks of columns behind the first, so that one has the matrix units for itself
// while the other works on its results. Clusters walk through the tiles in bands of GROUP * 256 rows of x and, every other
// tile, backwards through the columns: what the second-level cache saw last is used first.
//
// launch.cuh, hopper.cuh and the generated wgmma() stand before this file.

constexpr int ROWS = 128, COLUMNS = 128, STEP = 64, STAGES = 4;       // of x a block; of the result; of x and W at a time
constexpr int GROUP = 8;
constexpr int BOX_BYTES = 128 * STEP * 2, STAGE_BYTES = 3 * BOX_BYTES; // x, G, U
constexpr int RESULT_BYTES = 64 * COLUMNS * 2;                         // of a warpgroup
constexpr int WARPS = 8;                                               // that multiply

struct Tiles {
  int m_pairs, n_tiles, steps;   // 256 rows of x, 128 columns of the result, 64 columns of x and W each
  int width;                     // rows of G
};

__device__ __forceinline__ void cluster_meets() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
constexpr int BOTH = 3;   // the barrier of both multiplying warpgroups; 1 and 2 are their own

// gelu(gate) * up: 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) (g + 0.044715 g^3), right at both ends.
__device__ __forceinline__ float gated(float gate, float up) {
  constexpr float LINEAR = -2.3022082f, CUBIC = -0.10294324f;   // of -2 u / log(2)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power_of_two(gate * (LINEAR + CUBIC * (gate * gate)))));
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
    barriers_ready();
  }
  cluster_meets();
  previous_kernels_done();

  const int tiles = p.m_pairs * p.n_tiles, first_tile = blockIdx.x / 2, clusters = gridDim.x / 2;
  auto place = [&](int tile, int& row, int& column) {   // of the thread block's part of the result
    const int band = tile / (GROUP * p.n_tiles), within = tile % (GROUP * p.n_tiles), pairs = min(GROUP, p.m_pairs - band * GROUP);
    row = ((band * GROUP + within % pairs) * 2 + rank) * ROWS, column = within / pairs * COLUMNS;
  };
  int slot = 0;
  u32 phase = 0;
  auto next_slot = [&] {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  };

  if (warpgroup == 0) {   // ask for x and W
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      bool backwards = false;
      for (int tile = first_tile; tile < tiles; tile += clusters, backwards = !backwards) {
        int row, column;
        place(tile, row, column);
        const int w_row = column + rank * p.width;
#pragma unroll 1
        for (int step = 0; step < p.steps; ++step) {
          u8* const stage = shared + slot * STAGE_BYTES;
          const int from = (backwards ? p.steps - 1 - step : step) * STEP;
          barrier_wait(empty + slot, phase ^ 1);
          barrier_expect(full + slot, STAGE_BYTES);
          load_box(stage, x, from, row, full + slot);
          load_box_for_both(stage + (1 + rank) * BOX_BYTES, w, from, w_row, full + slot);
          next_slot();
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int half = warpgroup - 1, warp = threadIdx.x / 32 % 4;
    const bool asks_to_store = threadIdx.x % 128 == 0;
    u8* const result = results + half * RESULT_BYTES;
    const int lead = min(2, p.steps - 1);
    if (half == 1) asm volatile("bar.sync %0, 256;" ::"n"(BOTH) : "memory");
    for (int tile = first_tile; tile < tiles; tile += clusters) {
      float sum[COLUMNS];   // of 64 x 128 gates, then of as many ups
      int before = 0;
      auto release = [&] {
        if (lane < 2) barrier_arrive(empty + before, lane);
      };
      for (int step = 0; step < p.steps; ++step) {
        const u8* const stage = shared + slot * STAGE_BYTES;
        barrier_wait(full + slot, phase);
        const u64 a = descriptor(stage + half * (64 * STEP * 2)), b = descriptor(stage + BOX_BYTES);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < STEP / 16; ++i) wgmma(sum, a + i * 2, b + i * 2, step > 0 || i > 0);
        wgmma_close();
        if (step > 0) {
          wgmma_wait<1>();
          release();
        }
        if (half == 0 && step == lead && tile == first_tile) asm volatile("bar.arrive %0, 256;" ::"n"(BOTH) : "memory");
        before = slot;
        next_slot();
      }
      wgmma_wait<0>();
      settle(sum);
      release();

      if (asks_to_store) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");   // the result before has been read
      warpgroup_meets(warpgroup);
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
        store_matrices(to, pairs);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      warpgroup_meets(warpgroup);
      if (asks_to_store) {
        int row, column;
        place(tile, row, column);
        store_box(out, column, row + half * 64, result);
        store_box(out, column + 64, row + half * 64, result + RESULT_BYTES / 2);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
    if (asks_to_store) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  cluster_meets();   // neither leaves while the other may still arrive at its barriers or write to its stages
}
