// Attention on the GPU, backward, in one launch: a block has a head, a warp 16 of its keys with
// their gradients in registers, and tiles of queries pass by (Dao et al., "FlashAttention", NeurIPS
// 2022, appendix B). A warp computes its scores transposed, so that weights and gradients of scores
// are in registers what the products that go to its keys have on their left. Only grad_q adds up
// over keys, of all warps: they leave the gradients of the scores in shared memory, and each then
// has a part of the tile to itself. Nothing is atomic; the same inputs give the same bits.
//
// More keys than the warps hold come in turns. grad_q is then summed in float32 in global memory,
// each sum by one thread, which reads what it wrote the turn before.
#include "cuda/attention_tile.cuh"

#include <cuda_runtime.h>

namespace fastformer {
namespace {

constexpr int kWarpRows = kAttentionWarpRows;
constexpr int kStep = 32; // queries that a warp multiplies at once

// The sum of the products of eight neighbours.
template <typename T> __device__ __forceinline__ float dot(const uint4 &x, const uint4 &y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 left = unpack<T>(xs[i]), right = unpack<T>(ys[i]);
    sum += left.x * right.x + left.y * right.y;
  }
  return sum;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(32 * kSizes<kDim>.bwd_warps)
    attention_bwd_kernel(const __grid_constant__ Args a) {
  using R = Rows<kDim>;
  constexpr int kQueries = kSizes<kDim>.bwd_queries, kTile = kQueries * R::kBytes;
  using Scores = Rows<kQueries>;
  extern __shared__ __align__(256) unsigned char memory[];
  const int warps = blockDim.x / 32, block_keys = warps * kWarpRows;
  // What has a fixed size comes first: its addresses are constants.
  const uint32_t q_rows = shared_address(memory), grad_rows = q_rows + 2 * kTile,
                 out_rows = grad_rows + 2 * kTile, k_rows = out_rows + kTile + 16 * kQueries,
                 v_rows = k_rows + block_keys * R::kBytes, grad_s = v_rows + block_keys * R::kBytes;
  // What all threads know is read from here again and again: they have no registers to spare for it
  // nor for the addresses that the compiler would make of it ahead of a loop.
  __shared__ Head head;
  __shared__ struct {
    uint32_t k, v, grad_s;
  } rows_of;
  if (threadIdx.x == 0) {
    head = Head::at(a, blockIdx.x);
    rows_of.k = k_rows, rows_of.v = v_rows, rows_of.grad_s = grad_s;
  }
  __syncthreads();
  // For each query of a tile: lse as it is, of two tiles; in base 2; the sum of out * grad_out.
  float *lse = reinterpret_cast<float *>(memory + 5 * kTile);
  float *lse_log2 = lse + 2 * kQueries, *delta = lse_log2 + kQueries;

  const auto load_queries = [&](int first) {
    const int stage = first / kQueries % 2;
    const auto load = [&](uint32_t rows, const fastformer_attention_rows &x) {
      R::load(rows, head.queries<const T>(a, x), x.token_stride, first, kQueries, head.T, a.D);
    };
    load(q_rows + stage * kTile, a.q);
    load(grad_rows + stage * kTile, a.grad_out);
    load(out_rows, a.out);
    for (int i = threadIdx.x; i < kQueries; i += blockDim.x) {
      const bool valid = first + i < head.T;
      cp_async<4>(shared_address(lse + stage * kQueries + i), head.lse(a) + (valid ? first + i : 0),
                  valid);
    }
    cp_async_commit();
  };

  for (int key0 = 0; key0 == 0 || key0 < head.S; key0 += block_keys) {
    // The first turn meets all queries, as all need a gradient, a later one those that see its
    // keys.
    int begin = 0;
    if (key0 > 0) {
      begin = a.causal ? max(key0 + head.T - head.S, 0) / kQueries * kQueries : 0;
      begin = key0 < head.seen ? begin : head.T;
      __syncthreads();
    }
    const auto load_keys = [&](uint32_t rows, const fastformer_attention_rows &x) {
      R::load(rows, head.keys<const T>(a, x), x.token_stride, key0, block_keys, head.seen, a.D);
    };
    load_keys(k_rows, a.k);
    load_keys(v_rows, a.v);
    if (begin < head.T)
      load_queries(begin);
    float grad_k[kDim / 8][4] = {}, grad_v[kDim / 8][4] = {};
    for (int first = begin; first < head.T; first += kQueries) {
      const int stage = first / kQueries % 2;
      cp_async_wait<0>();
      __syncthreads();
      for (int i = threadIdx.x; i < kQueries * R::kChunks; i += blockDim.x) {
        const int row = i / R::kChunks, chunk = i % R::kChunks;
        float sum = dot<T>(load_shared(R::at(out_rows, row, chunk)),
                           load_shared(R::at(grad_rows + stage * kTile, row, chunk)));
#pragma unroll
        for (int lanes = R::kChunks / 2; lanes; lanes /= 2)
          sum += __shfl_xor_sync(kAllLanes, sum, lanes);
        if (chunk == 0) {
          const float x = lse[stage * kQueries + row];
          // With +inf the weights are 0, in rows that see no key (-inf) as in those beyond T.
          const bool sees = first + row < head.T && x != -INFINITY;
          lse_log2[row] = sees ? x * kLog2E : INFINITY;
          delta[row] = sum;
        }
      }
      __syncthreads();
      if (first + kQueries < head.T)
        load_queries(first + kQueries);

      // How many warps have keys that the tile sees.
      const auto slices = [&] {
        const int seen = head.keys_seen_before(first + kQueries) - key0;
        return min((max(seen, 0) + kWarpRows - 1) / kWarpRows, warps);
      };
      if (Lane().warp < slices()) {
#pragma unroll 1
        for (int step = 0; step < kQueries; step += kStep) {
          const uint32_t at = static_cast<uint32_t>(first + step) % (2 * kQueries) * R::kBytes;
          const uint32_t q_step = q_rows + at, grad_step = grad_rows + at;
          const Lane me;
          const int warp = me.warp, lane = me.lane, g = me.g, t = me.t;
          const int warp_key = key0 + warp * kWarpRows;
          float p[kStep / 8][4] = {};
          multiply_transposed<T, kDim, kStep>(p, R::below(rows_of.k, warp * kWarpRows, lane),
                                              R::beside(q_step, 0, lane));
          const bool masked = warp_key + kWarpRows > head.keys_seen_before(first + step + 1);
#pragma unroll
          for (int i = 0; i < kStep / 8; ++i) {
            const int query = step + i * 8 + 2 * t;
            const float2 x = *reinterpret_cast<const float2 *>(lse_log2 + query);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              p[i][j] = exp2_approx(p[i][j] * head.scale_log2 - (j % 2 ? x.y : x.x));
              if (masked &&
                  warp_key + g + j / 2 * 8 >= head.keys_seen_before(first + query + j % 2 + 1))
                p[i][j] = 0.0f;
            }
          }
          if (head.drops) { // a weight that is dropped becomes negative
            // Of query `lane` of the step, the warp's keys, a bit each.
            const int own = first + step + lane;
            const uint32_t kept = head.keep_bits(a, own, warp_key) |
                                  head.keep_bits(a, own, warp_key + kColsPerDraw) << 8;
#pragma unroll
            for (int i = 0; i < kStep / 8; ++i)
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const uint32_t bits = __shfl_sync(kAllLanes, kept, i * 8 + 2 * t + j) >> g;
                p[i][j] = bits & 1 ? p[i][j] : -p[i][j];
                p[i][j + 2] = bits >> 8 & 1 ? p[i][j + 2] : -p[i][j + 2];
              }
          }
          uint32_t left[kStep / 16][4];
          {
            float weights[kStep / 8][4];
#pragma unroll
            for (int i = 0; i < kStep / 8; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j)
                weights[i][j] = p[i][j] < 0.0f ? 0.0f : p[i][j]; // NaN stays
            round_to<T, kStep>(left, weights);
          }
          multiply<T, kDim, kStep>(grad_v, left, R::below(grad_step, 0, lane));
          float grad_p[kStep / 8][4] = {};
          multiply_transposed<T, kDim, kStep>(grad_p, R::below(rows_of.v, warp * kWarpRows, lane),
                                              R::beside(grad_step, 0, lane));
#pragma unroll
          for (int i = 0; i < kStep / 8; ++i) {
            const float2 d = *reinterpret_cast<const float2 *>(delta + step + i * 8 + 2 * t);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float grad = p[i][j] < 0.0f ? 0.0f : grad_p[i][j] * a.dropout.scale;
              grad_p[i][j] = fabsf(p[i][j]) * (grad - (j % 2 ? d.y : d.x));
            }
          }
          round_to<T, kStep>(left, grad_p);
          multiply<T, kDim, kStep>(grad_k, left, R::below(q_step, 0, lane));
#pragma unroll
          for (int i = 0; i < kStep / 16; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int row = warp * kWarpRows + g + j % 2 * 8, chunk = step / 8 + 2 * i + j / 2;
              store_shared(Scores::at(rows_of.grad_s, row, chunk) + 4 * t, left[i][j]);
            }
        }
      }
      __syncthreads();

      // The queries are 16 times the rows of a part, the head dim 16 times its columns.
      constexpr int kPartRows = kQueries / 16, kParts = kPartRows * (kDim / 16);
      const bool is_last = key0 + block_keys >= head.keys_seen_before(first + kQueries);
      const Lane me;
      const int count = slices();
      for (int part = me.warp; part < kParts; part += warps) {
        const int rows = part % kPartRows, cols = part / kPartRows;
        const uint32_t s_part = Scores::move(Scores::beside(grad_s, 0, me.lane), 0, rows),
                       b_part = R::move(R::below(k_rows, 0, me.lane), 0, cols);
        float grad_q[2][4] = {};
#pragma unroll 2
        for (int slice = 0; slice < count; ++slice) {
          uint32_t s[4], b[4];
          ldmatrix_transposed(s, Scores::move(s_part, slice, 0));
          ldmatrix_transposed(b, R::move(b_part, slice, 0));
          mma<T>(grad_q[0], s, b[0], b[1]);
          mma<T>(grad_q[1], s, b[2], b[3]);
        }
        if (key0 > 0 || !is_last) {
          const int tiles = (a.T + kQueries - 1) / kQueries; // of the longest sequence
          const int64_t tile = static_cast<int64_t>(blockIdx.x) * tiles + first / kQueries;
          float4 *sums = reinterpret_cast<float4 *>(a.sums) + (tile * kParts + part) * 64 + me.lane;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float (&sum)[4] = grad_q[i];
            if (key0 > 0) {
              const float4 before = sums[32 * i];
              sum[0] += before.x, sum[1] += before.y, sum[2] += before.z, sum[3] += before.w;
            }
            if (!is_last)
              sums[32 * i] = make_float4(sum[0], sum[1], sum[2], sum[3]);
          }
        }
        if (is_last) {
          const int row = first + rows * 16;
          T *to = head.queries<T>(a, a.grad_q) + row * a.grad_q.token_stride;
          store_16x16(to + cols * 16, a.grad_q.token_stride, head.T - row, a.D - cols * 16,
                      grad_q[0], grad_q[1], a.scale, a.scale);
        }
      }
    }
    cp_async_wait<0>();
    const int warp_key = key0 + Lane().warp * kWarpRows;
    const auto store = [&](const fastformer_attention_rows &x, const float (&grad)[kDim / 8][4],
                           float factor) {
      T *to = head.keys<T>(a, x) + warp_key * x.token_stride;
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i)
        store_16x16(to + i * 16, x.token_stride, head.S - warp_key, a.D - i * 16, grad[2 * i],
                    grad[2 * i + 1], factor, factor);
    };
    store(a.grad_k, grad_k, a.scale);
    store(a.grad_v, grad_v, a.dropout.scale);
  }
}

template <typename T, int kDim>
cudaError_t run(const AttentionLaunch &launch, const Args &a, cudaStream_t stream) {
  const auto kernel = attention_bwd_kernel<T, kDim>;
  const int shared = static_cast<int>(launch.shared_bytes);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  kernel<<<static_cast<unsigned>(launch.blocks), launch.threads, shared, stream>>>(a);
  return cudaGetLastError();
}

} // namespace
} // namespace fastformer

extern "C" int64_t fastformer_attention_bwd_sums(int64_t heads, int64_t T, int64_t S, int64_t D) {
  return fastformer::attention_bwd_sums(heads, T, S, D);
}

extern "C" int fastformer_attention_bwd(const fastformer_attention_args *args,
                                        fastformer_stream stream) {
  using namespace fastformer;
  const fastformer_attention_args &a = *args;
  if (a.B * a.H == 0 || a.D == 0 || (a.T == 0 && a.S == 0))
    return cudaSuccess;
  const AttentionLaunch launch = attention_bwd_launch(a.B * a.H, a.S, a.D);
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
