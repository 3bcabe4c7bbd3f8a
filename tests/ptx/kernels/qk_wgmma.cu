// S = Q K^T for sm_90a: one warpgroup loads tiles by TMA, the other multiplies them by wgmma.
// Two tiles of K are in turn; an mbarrier each says that a tile is full, or free again.
#include "ptx_sm90.cuh"

constexpr int kTile = 64; // rows of Q and of K, and columns of both
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kStages = 2;

__global__ void __launch_bounds__(256, 1)
    qk_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
              float *__restrict__ s, int N) {
  extern __shared__ __align__(1024) unsigned char memory[];
  unsigned char *q = memory, *k = memory + kTileBytes;
  uint64_t *q_full = reinterpret_cast<uint64_t *>(memory + kTileBytes * (1 + kStages));
  uint64_t *full = q_full + 1, *empty = full + kStages;
  const int warpgroup = threadIdx.x / 128, row0 = blockIdx.x * kTile, tiles = N / kTile;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, 128);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) {
      ptx::mbarrier_expect(q_full, kTileBytes);
      ptx::tma_load_2d(q, &q_map, q_full, 0, row0);
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages, phase = tile / kStages % 2;
        ptx::mbarrier_wait(empty + stage, phase ^ 1); // the first time nothing has to be waited for
        ptx::mbarrier_expect(full + stage, kTileBytes);
        ptx::tma_load_2d(k + stage * kTileBytes, &k_map, full + stage, 0, tile * kTile);
      }
    }
  } else {
    ptx::take_registers<232>();
    ptx::mbarrier_wait(q_full, 0);
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages, phase = tile / kStages % 2;
      float d[32];
      ptx::mbarrier_wait(full + stage, phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kTile / 16; ++i) // 16 columns are 32 bytes, 2 in a descriptor
        ptx::wgmma_64x64x16(d, ptx::descriptor_swizzle128(q) + 2 * i,
                            ptx::descriptor_swizzle128(k + stage * kTileBytes) + 2 * i, i > 0);
      ptx::wgmma_commit();
#ifndef BUG_RESULT_NOT_AWAITED
      ptx::wgmma_wait<0>();
#endif
      ptx::mbarrier_arrive(empty + stage);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int row = row0 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
        const int col = tile * kTile + i / 4 * 8 + lane % 4 * 2 + i % 2;
        s[static_cast<size_t>(row) * N + col] = d[i];
      }
    }
  }
}
