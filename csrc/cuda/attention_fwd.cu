// Attention on the GPU, forward: a block has up to 128 queries of a head, a warp 16 of them, and
// keys and values pass by in tiles. Softmax is online (Dao, "FlashAttention-2", 2023, section 3.1)
// and in base 2. While a tile is multiplied the next is on its way; the two tiles of a sequence of
// 128 are so from the start. Blocks of one head run at the same time and share its keys in L2.
#include "cuda/attention_tile.cuh"

#include <cuda_runtime.h>

namespace fastformer {
namespace {

constexpr int kWarpRows = kAttentionWarpRows, kStages = kAttentionFwdStages;

// Keeps of 32 keys of a row, a bit each; the four lanes of a quad make one draw each.
__device__ __forceinline__ uint32_t quad_keep_bits(const Args &a, const Head &head, int query,
                                                   int key) {
  const int t = threadIdx.x % 4;
  uint32_t bits = head.keep_bits(a, query, key + kColsPerDraw * t) << (8 * t);
  bits |= __shfl_xor_sync(kAllLanes, bits, 1);
  return bits | __shfl_xor_sync(kAllLanes, bits, 2);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(32 * kSizes<kDim>.fwd_warps, 2)
    attention_fwd_kernel(const __grid_constant__ Args a) {
  using R = Rows<kDim>;
  constexpr int kKeys = kSizes<kDim>.fwd_keys, kTile = kKeys * R::kBytes;
  extern __shared__ __align__(256) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int block_rows = blockDim.x / 32 * kWarpRows;
  const int blocks = (a.T + block_rows - 1) / block_rows;
  const Head head = Head::at(a, blockIdx.x / blocks);
  const int first = blockIdx.x % blocks * block_rows, row = first + warp * kWarpRows;
  if (first >= head.T)
    return;
  const uint32_t k_rows = shared_address(memory), v_rows = k_rows + kStages * kTile,
                 q_rows = v_rows + kStages * kTile;
  const T *k = head.keys<const T>(a, a.k);
  const T *v = head.keys<const T>(a, a.v);
  const int end = head.keys_seen_before(first + block_rows);
  const auto load_keys = [&](int start) {
    const int stage = start / kKeys % kStages;
    R::load(k_rows + stage * kTile, k, a.k.token_stride, start, kKeys, head.seen, a.D);
    R::load(v_rows + stage * kTile, v, a.v.token_stride, start, kKeys, head.seen, a.D);
  };

  R::load(q_rows, head.queries<const T>(a, a.q), a.q.token_stride, first, block_rows, head.T, a.D);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage * kKeys < end)
      load_keys(stage * kKeys);
    cp_async_commit();
  }

  int ends[2]; // of the keys that the lane's two rows see
  float acc[kDim / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r)
    ends[r] = head.keys_seen_before(row + g + 8 * r + 1);
  const int all_see = head.keys_seen_before(row + 1);
  const int warp_end = row < head.T ? head.keys_seen_before(row + kWarpRows) : 0;
  const uint32_t q_part = R::below(q_rows, warp * kWarpRows, lane),
                 k_part = R::beside(k_rows, 0, lane), v_part = R::below(v_rows, 0, lane);

  for (int start = 0; start < end; start += kKeys) {
    const int stage = start / kKeys % kStages;
    cp_async_wait<kStages - 1>();
    __syncthreads();
    if (start < warp_end) {
      float s[kKeys / 8][4] = {};
      multiply_transposed<T, kDim, kKeys>(s, q_part, k_part + stage * kTile);
      uint32_t kept[2][kKeys / 32] = {};
      if (a.dropout.rng) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int i = 0; i < kKeys / 32; ++i)
            kept[r][i] = quad_keep_bits(a, head, row + g + 8 * r, start + 32 * i);
      }
      const bool masked = start + kKeys > all_see;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[i][j] *= head.scale_log2;
          if (masked && start + i * 8 + 2 * t + j % 2 >= ends[j / 2])
            s[i][j] = -INFINITY;
        }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float max = row_max[r];
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i)
          max = fmaxf(max, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
        // A row that has seen no key has weights of 0, not exp2(-inf + inf).
        const float finite = max == -INFINITY ? 0.0f : max;
        const float decay = exp2_approx(row_max[r] - finite);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
          for (int j = 2 * r; j < 2 * r + 2; ++j) {
            s[i][j] = exp2_approx(s[i][j] - finite);
            sum += s[i][j];
            if (a.dropout.rng && !(kept[r][i / 4] >> (i % 4 * 8 + 2 * t + j % 2) & 1))
              s[i][j] = 0.0f;
          }
        row_max[r] = max;
        row_sum[r] = row_sum[r] * decay + sum;
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          acc[i][2 * r] *= decay;
          acc[i][2 * r + 1] *= decay;
        }
      }
      uint32_t p[kKeys / 16][4];
      round_to<T, kKeys>(p, s);
      multiply<T, kDim, kKeys>(acc, p, v_part + stage * kTile);
    }
    const int next = start + kStages * kKeys;
    if (next < end) {
      __syncthreads();
      load_keys(next);
    }
    cp_async_commit();
  }
  cp_async_wait<0>();
  if (row >= head.T)
    return;

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = row_sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    factor[r] = sum == 0.0f ? 0.0f : a.dropout.scale / sum;
    const int token = row + g + 8 * r;
    if (t == 0 && token < head.T)
      head.lse(a)[token] = (row_max[r] + log2f(sum)) * kLn2;
  }
  T *out = head.queries<T>(a, a.out) + row * a.out.token_stride;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    store_16x16(out + i * 16, a.out.token_stride, head.T - row, a.D - i * 16, acc[2 * i],
                acc[2 * i + 1], factor[0], factor[1]);
}

template <typename T, int kDim>
cudaError_t run(const AttentionLaunch &launch, const Args &a, cudaStream_t stream) {
  const auto kernel = attention_fwd_kernel<T, kDim>;
  const int shared = static_cast<int>(launch.shared_bytes);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  kernel<<<static_cast<unsigned>(launch.blocks), launch.threads, shared, stream>>>(a);
  return cudaGetLastError();
}

} // namespace
} // namespace fastformer

extern "C" int fastformer_attention_fwd(const fastformer_attention_args *args,
                                        fastformer_stream stream) {
  using namespace fastformer;
  const fastformer_attention_args &a = *args;
  if (a.B * a.H == 0 || a.T == 0 || a.D == 0)
    return cudaSuccess;
  const AttentionLaunch launch = attention_fwd_launch(a.B * a.H, a.T, a.D);
  if (launch.blocks > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  const bool narrow = launch.dim == 64;
  if (a.type == FASTFORMER_BFLOAT16)
    return narrow ? run<__nv_bfloat16, 64>(launch, a, stream)
                  : run<__nv_bfloat16, 128>(launch, a, stream);
  if (a.type == FASTFORMER_FLOAT16)
    return narrow ? run<__half, 64>(launch, a, stream) : run<__half, 128>(launch, a, stream);
  return cudaErrorInvalidValue;
}
