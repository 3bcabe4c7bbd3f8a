// Attention forward with an online softmax (Dao, "FlashAttention-2", 2023): mma.sync on tiles that
// cp.async brings to swizzled shared memory, two of K and two of V in turn.
#include "ptx.cuh"

using bf16 = __nv_bfloat16;

constexpr int kTile = 64; // rows of Q of a block, and of K and V in a turn
constexpr int kWarps = 4; // 16 rows of Q each
constexpr int kChunk = 8; // elements in 16 bytes
constexpr int kFragment = 16;

// A tile in shared memory: 16-byte chunks, permuted in a row so that ldmatrix has no conflicts.
template <int D> __device__ __forceinline__ uint32_t chunk_at(bf16 *tile, int row, int chunk) {
  return ptx::shared_address(tile) + (row * (D / kChunk) + (chunk ^ (row & 7))) * 16;
}

template <int D>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *__restrict__ x, int row0, int N) {
  constexpr int kChunks = D / kChunk;
  for (int i = threadIdx.x; i < kTile * kChunks; i += kWarps * 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = row0 + row < N;
    const bf16 *from = x + static_cast<size_t>(valid ? row0 + row : 0) * D + chunk * kChunk;
    ptx::cp_async16(chunk_at<D>(tile, row, chunk), from, valid);
  }
}

// q, k, v, out: (heads, N, D); lse: (heads, N), base 2. scale_log2 is scale * log2(e).
template <int D, bool kCausal>
__global__ void __launch_bounds__(kWarps * 32)
    flash_fwd_kernel(const bf16 *__restrict__ q, const bf16 *__restrict__ k,
                     const bf16 *__restrict__ v, bf16 *__restrict__ out, float *__restrict__ lse,
                     int N, float scale_log2) {
  extern __shared__ __align__(1024) unsigned char memory[];
  bf16 *q_tile = reinterpret_cast<bf16 *>(memory), *k_tiles = q_tile + kTile * D,
       *v_tiles = k_tiles + 2 * kTile * D;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = blockIdx.x * kTile;
  const size_t head = static_cast<size_t>(blockIdx.y) * N;
  q += head * D, k += head * D, v += head * D, out += head * D, lse += head;
  const int keys = kCausal ? min(N, row0 + kTile) : N, tiles = (keys + kTile - 1) / kTile;

  load_tile<D>(q_tile, q, row0, N);
  load_tile<D>(k_tiles, k, 0, N);
  ptx::cp_async_commit();
  load_tile<D>(v_tiles, v, 0, N);
  ptx::cp_async_commit();

  float acc[D / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
  uint32_t q_part[D / kFragment][4];
  for (int tile = 0; tile < tiles; ++tile) {
    bf16 *k_tile = k_tiles + (tile & 1) * kTile * D, *v_tile = v_tiles + (tile & 1) * kTile * D;
    bf16 *k_next = k_tiles + (~tile & 1) * kTile * D, *v_next = v_tiles + (~tile & 1) * kTile * D;
    ptx::cp_async_wait<1>(); // K, and Q the first time; V may be on its way
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int i = 0; i < D / kFragment; ++i)
        ptx::ldmatrix_x4(q_part[i], chunk_at<D>(q_tile, warp * 16 + lane % 16, i * 2 + lane / 16));
    }
    if (tile + 1 < tiles)
      load_tile<D>(k_next, k, (tile + 1) * kTile, N);
    ptx::cp_async_commit();

    float s[kTile / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / kFragment; ++i)
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t k_part[4];
        ptx::ldmatrix_x4(
            k_part, chunk_at<D>(k_tile, n * 16 + lane % 8 + lane / 16 * 8, i * 2 + lane / 8 % 2));
        ptx::mma_16x8x16(s[2 * n], q_part[i], k_part[0], k_part[1]);
        ptx::mma_16x8x16(s[2 * n + 1], q_part[i], k_part[2], k_part[3]);
      }

    const int col0 = tile * kTile, warp_row = row0 + warp * 16;
    const bool partial = col0 + kTile > N || (kCausal && col0 + kTile > warp_row + 1);
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int col = col0 + i * 8 + lane % 4 * 2 + j % 2, row = warp_row + lane / 4 + j / 2 * 8;
        s[i][j] *= scale_log2;
        if (partial && (col >= N || (kCausal && col > row)))
          s[i][j] = -INFINITY;
      }

#pragma unroll
    for (int h = 0; h < 2; ++h) { // the thread's two rows
      float max = row_max[h];
#pragma unroll
      for (int i = 0; i < kTile / 8; ++i)
        max = fmaxf(max, fmaxf(s[i][2 * h], s[i][2 * h + 1]));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
      const float finite = max == -INFINITY ? 0.0f : max;
      const float decay = ptx::exp2_approx(row_max[h] - finite);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kTile / 8; ++i)
#pragma unroll
        for (int j = 2 * h; j < 2 * h + 2; ++j) {
          s[i][j] = ptx::exp2_approx(s[i][j] - finite);
          sum += s[i][j];
        }
      row_max[h] = max;
      row_sum[h] = row_sum[h] * decay + sum;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        acc[i][2 * h] *= decay;
        acc[i][2 * h + 1] *= decay;
      }
    }

#ifdef BUG_V_NOT_WAITED_FOR
    ptx::cp_async_wait<2>();
#else
    ptx::cp_async_wait<1>(); // V; the next K may be on its way
#endif
    __syncthreads();
    if (tile + 1 < tiles)
      load_tile<D>(v_next, v, (tile + 1) * kTile, N);
    ptx::cp_async_commit();
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
      uint32_t p_part[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float *pair = s[2 * i + j / 2] + j % 2 * 2;
        const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair[0], pair[1]);
        p_part[j] = *reinterpret_cast<const uint32_t *>(&rounded);
      }
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t v_part[4];
        ptx::ldmatrix_x4_trans(v_part, chunk_at<D>(v_tile, i * 16 + lane % 16, n * 2 + lane / 16));
        ptx::mma_16x8x16(acc[2 * n], p_part, v_part[0], v_part[1]);
        ptx::mma_16x8x16(acc[2 * n + 1], p_part, v_part[2], v_part[3]);
      }
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = row_sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int row = row0 + warp * 16 + lane / 4 + h * 8;
    if (row >= N)
      continue;
    const float inverse = 1.0f / sum;
    bf16 *to = out + static_cast<size_t>(row) * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      *reinterpret_cast<__nv_bfloat162 *>(to + i * 8) =
          __floats2bfloat162_rn(acc[i][2 * h] * inverse, acc[i][2 * h + 1] * inverse);
    if (lane % 4 == 0)
      lse[row] = row_max[h] + log2f(sum);
  }
}

#define INSTANTIATE(D, CAUSAL)                                                                     \
  template __global__ void flash_fwd_kernel<D, CAUSAL>(const bf16 *, const bf16 *, const bf16 *,   \
                                                       bf16 *, float *, int, float);
INSTANTIATE(64, false)
INSTANTIATE(64, true)
INSTANTIATE(128, true)
