// LayerNorm on the GPU, alone and fused with the residual addition and dropout before it.
//
// A row is read once into registers, of a warp where it is short, else of a block, and the variance
// is that of the centred values. Backward also reads each row once: a block walks every so many
// rows, keeps its sums for weight and bias in registers and leaves them in memory. The last block
// of each group to do so adds up its group's, and the last of those the groups', in one order
// whoever comes last. Counted in bytes that one multiprocessor reads, that takes 4 us at C = 768
// and 20 at 8192; a second launch, which would add on all of them, takes 4 and time of the host.
#include "cuda/chunk.cuh"
#include "cuda/launchers.h"
#include "cuda/layer_norm.h"
#include "cuda/tickets.h"

namespace fastformer {
namespace {

static_assert(kLayerNormChunk == kChunk);
static_assert(kLayerNormTickets <= kMaxTickets);
constexpr int kGroup = kLayerNormGroup;

__device__ __forceinline__ float2 warp_sum(float2 v) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, lanes);
    v.y += __shfl_xor_sync(0xffffffffu, v.y, lanes);
  }
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1)
    v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

__device__ __forceinline__ void clear(float &v) { v = 0.0f; }
__device__ __forceinline__ void clear(float2 &v) { v = make_float2(0.0f, 0.0f); }

// The sum over those who share a row, in all of them. Calls in turn use the one and the other half
// of `partial`: the barrier of a call keeps it from the reads of the last but one.
template <bool kWarp, typename V>
__device__ __forceinline__ V row_sum(V v, V (&partial)[2][32], int turn) {
  v = warp_sum(v);
  if constexpr (!kWarp) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0)
      partial[turn][warp] = v;
    __syncthreads();
    clear(v);
    if (lane < blockDim.x / 32)
      v = partial[turn][lane];
    v = warp_sum(v);
  }
  return v;
}

template <int kMode> struct Shape {
  static constexpr bool kWarp = kMode == kLayerNormWarp, kWide = kMode != kLayerNormScalar;
  static constexpr int kChunks = kWarp ? kLayerNormWarpChunks : kLayerNormBlockChunks;
  static constexpr int kMaxThreads = kWarp ? 32 * kLayerNormWarps : kLayerNormBlockThreads;
  static constexpr int kRows = kWarp ? kLayerNormWarps : 1;

  static __device__ __forceinline__ int lane() { return kWarp ? threadIdx.x % 32 : threadIdx.x; }
  static __device__ __forceinline__ int64_t first_row() {
    return static_cast<int64_t>(blockIdx.x) * kRows + (kWarp ? threadIdx.x / 32 : 0);
  }
  static __device__ __forceinline__ int col(int chunk) {
    return (chunk * (kWarp ? 32 : blockDim.x) + lane()) * kChunk;
  }
};

// x null: the rows of `residual` are normalised as they are. rng null: nothing is dropped.
template <typename X, typename S, typename O, int kMode>
__global__ void __launch_bounds__(Shape<kMode>::kMaxThreads)
    layer_norm_fwd_kernel(const X *__restrict__ x, const S *__restrict__ residual,
                          const float *__restrict__ weight, const float *__restrict__ bias,
                          S *__restrict__ new_residual, O *__restrict__ normed,
                          float *__restrict__ mean, float *__restrict__ rstd,
                          const int64_t *__restrict__ rng, int64_t N, int C, float eps,
                          int64_t site, uint32_t threshold, float scale) {
  using L = Shape<kMode>;
  __shared__ float partial[2][32];
  const int64_t row = L::first_row();
  if (L::kWarp && row >= N)
    return;
  const int64_t at = row * C;
  float v[L::kChunks][kChunk];
#pragma unroll
  for (int i = 0; i < L::kChunks; ++i)
    load<L::kWide>(v[i], residual + at, L::col(i), C);
  if (x) {
    float branch[L::kChunks][kChunk];
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i)
      load<L::kWide>(branch[i], x + at, L::col(i), C);
    if (rng) {
      const uint64_t seed = static_cast<uint64_t>(rng[0]);
      const uint64_t stream = static_cast<uint64_t>(rng[1]) + static_cast<uint64_t>(site);
#pragma unroll
      for (int i = 0; i < L::kChunks; ++i)
        apply_dropout(branch[i], draw(seed, stream, row, L::col(i)), threshold, scale);
    }
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
      // The statistics are those of the sum as it is stored, which backward reads.
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        v[i][j] = to_float(from_float<S>(v[i][j] + branch[i][j]));
      store<L::kWide>(new_residual + at, v[i], L::col(i), C);
    }
  }
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < L::kChunks; ++i)
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      sum += L::col(i) + j < C ? v[i][j] : 0.0f;
  const float mu = row_sum<L::kWarp>(sum, partial, 0) / C;
#pragma unroll
  for (int i = 0; i < L::kChunks; ++i)
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float d = L::col(i) + j < C ? v[i][j] - mu : 0.0f;
      squares += d * d;
    }
  const float r = rsqrtf(row_sum<L::kWarp>(squares, partial, 1) / C + eps);
#pragma unroll
  for (int i = 0; i < L::kChunks; ++i) {
    float w[kChunk], b[kChunk] = {};
    load<L::kWide>(w, weight, L::col(i), C);
    if (bias)
      load<L::kWide>(b, bias, L::col(i), C);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      v[i][j] = (v[i][j] - mu) * r * w[j] + b[j];
    store<L::kWide>(normed + at, v[i], L::col(i), C);
  }
  if (L::lane() == 0) {
    mean[row] = mu;
    rstd[row] = r;
  }
}

// Whether this block is the last of `count` to get here; it sees what the others have stored.
__device__ __forceinline__ bool comes_last(unsigned *ticket, int count) {
  __shared__ bool is_last;
  __syncthreads(); // all threads have stored theirs, and know the last answer
  if (threadIdx.x == 0) {
    __threadfence();
    // The last one leaves 0, for the next launch.
    is_last =
        atomicInc(ticket, static_cast<unsigned>(count - 1)) + 1 == static_cast<unsigned>(count);
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

// Adds the rows [first, end) of sums that are `step` apart; `write` gets each column's, or four's.
template <bool kWide, typename F>
__device__ __forceinline__ void add_rows(const float *sums, int first, int end, int step, int C,
                                         F write) {
  constexpr int kPiece = kWide ? 4 : 1;
  for (int col = threadIdx.x * kPiece; col < 2 * C; col += blockDim.x * kPiece) {
    float total[kPiece] = {};
#pragma unroll 8
    for (int row = first; row < end; row += step) {
      const float *at = sums + static_cast<int64_t>(row) * 2 * C + col;
      if constexpr (kWide) {
        const float4 piece = __ldcg(reinterpret_cast<const float4 *>(at));
        total[0] += piece.x, total[1] += piece.y, total[2] += piece.z, total[3] += piece.w;
      } else {
        total[0] += __ldcg(at);
      }
    }
    write(col, total);
  }
}

template <int kPiece>
__device__ __forceinline__ void store_as(int type, void *out, int at, const float (&v)[kPiece]) {
#pragma unroll
  for (int j = 0; j < kPiece; ++j)
    if (type == FASTFORMER_FLOAT32)
      static_cast<float *>(out)[at + j] = v[j];
    else if (type == FASTFORMER_BFLOAT16)
      static_cast<__nv_bfloat16 *>(out)[at + j] = from_float<__nv_bfloat16>(v[j]);
    else
      static_cast<__half *>(out)[at + j] = from_float<__half>(v[j]);
}

// grad_x null: there was no branch. sums (blocks, 2, C): those of weight, then those of bias.
template <typename X, typename S, typename O, int kMode>
__global__ void __launch_bounds__(Shape<kMode>::kMaxThreads)
    layer_norm_bwd_kernel(const O *__restrict__ grad_normed,
                          const S *__restrict__ grad_new_residual, const S *__restrict__ rows,
                          const float *__restrict__ weight, const float *__restrict__ mean,
                          const float *__restrict__ rstd, X *__restrict__ grad_x,
                          S *__restrict__ grad_rows, void *__restrict__ grad_weight,
                          void *__restrict__ grad_bias, float *sums, unsigned *tickets,
                          const int64_t *__restrict__ rng, int64_t N, int C, int64_t site,
                          uint32_t threshold, float scale, int weight_type) {
  using L = Shape<kMode>;
  __shared__ float2 partial[2][32];
  float sum_weight[L::kChunks][kChunk] = {}, sum_bias[L::kChunks][kChunk] = {};
  const uint64_t seed = rng ? static_cast<uint64_t>(rng[0]) : 0;
  const uint64_t stream = rng ? static_cast<uint64_t>(rng[1]) + static_cast<uint64_t>(site) : 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * L::kRows;
  int turn = 0;
  for (int64_t row = L::first_row(); row < N; row += step, turn ^= 1) {
    const int64_t at = row * C;
    const float mu = mean[row], r = rstd[row];
    float normal[L::kChunks][kChunk], grad[L::kChunks][kChunk];
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
      load<L::kWide>(normal[i], rows + at, L::col(i), C);
      load<L::kWide>(grad[i], grad_normed + at, L::col(i), C);
    }
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
      float w[kChunk];
      load<L::kWide>(w, weight, L::col(i), C);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        // Beyond C the gradient is 0, and nothing of `normal` counts.
        normal[i][j] = (normal[i][j] - mu) * r;
        sum_weight[i][j] += grad[i][j] * normal[i][j];
        sum_bias[i][j] += grad[i][j];
        grad[i][j] *= w[j];
        sum.x += grad[i][j];
        sum.y += grad[i][j] * normal[i][j];
      }
    }
    sum = row_sum<L::kWarp>(sum, partial, turn);
    const float average = sum.x / C, along = sum.y / C;
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
      float passed[kChunk] = {};
      if (grad_new_residual)
        load<L::kWide>(passed, grad_new_residual + at, L::col(i), C);
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        grad[i][j] = (grad[i][j] - average - normal[i][j] * along) * r + passed[j];
      store<L::kWide>(grad_rows + at, grad[i], L::col(i), C);
      if (grad_x) {
        if (rng)
          apply_dropout(grad[i], draw(seed, stream, row, L::col(i)), threshold, scale);
        store<L::kWide>(grad_x + at, grad[i], L::col(i), C);
      }
    }
  }
  float *out = sums + static_cast<int64_t>(blockIdx.x) * 2 * C;
  if constexpr (L::kWarp) {
    // The warps add theirs one after another.
    __shared__ alignas(16) float total[2][kLayerNormWarpCols];
    for (int warp = 0; warp < kLayerNormWarps; ++warp) {
      if (threadIdx.x / 32 == warp)
#pragma unroll
        for (int i = 0; i < L::kChunks; ++i) {
          float w[kChunk] = {}, b[kChunk] = {};
          if (warp) {
            load<true>(w, total[0], L::col(i), C);
            load<true>(b, total[1], L::col(i), C);
          }
#pragma unroll
          for (int j = 0; j < kChunk; ++j) {
            w[j] += sum_weight[i][j];
            b[j] += sum_bias[i][j];
          }
          store<true>(total[0], w, L::col(i), C);
          store<true>(total[1], b, L::col(i), C);
        }
      __syncthreads();
    }
    for (int col = threadIdx.x * 4; col < C; col += 4 * 32 * kLayerNormWarps) {
      *reinterpret_cast<float4 *>(out + col) = *reinterpret_cast<const float4 *>(total[0] + col);
      *reinterpret_cast<float4 *>(out + C + col) =
          *reinterpret_cast<const float4 *>(total[1] + col);
    }
  } else {
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
      store<L::kWide>(out, sum_weight[i], L::col(i), C);
      store<L::kWide>(out + C, sum_bias[i], L::col(i), C);
    }
  }
  const int blocks = static_cast<int>(gridDim.x), group = static_cast<int>(blockIdx.x) / kGroup;
  const int first = group * kGroup, end = min(first + kGroup, blocks);
  if (!comes_last(tickets + 1 + group, end - first))
    return;
  add_rows<L::kWide>(sums, first, end, 1, C, [&](int col, const auto &total) {
    store_as(FASTFORMER_FLOAT32, sums + static_cast<int64_t>(first) * 2 * C, col, total);
  });
  if (!comes_last(tickets, (blocks + kGroup - 1) / kGroup))
    return;
  add_rows<L::kWide>(sums, 0, blocks, kGroup, C, [&](int col, const auto &total) {
    const bool of_weight = col < C;
    store_as(weight_type, of_weight ? grad_weight : grad_bias, of_weight ? col : col - C, total);
  });
}

uint64_t address(const void *p) { return reinterpret_cast<uint64_t>(p); }

// Calls `run` with values of the three types, if there are kernels for them.
template <typename F> bool with_types(int x, int residual, int normed, F run) {
  constexpr int f = FASTFORMER_FLOAT32, b = FASTFORMER_BFLOAT16, h = FASTFORMER_FLOAT16;
  const auto are = [&](int i, int j, int k) { return x == i && residual == j && normed == k; };
  const float single = 0.0f;
  const __nv_bfloat16 brain{};
  const __half half{};
  if (are(f, f, f))
    run(single, single, single);
  else if (are(b, b, b))
    run(brain, brain, brain);
  else if (are(h, h, h))
    run(half, half, half);
  else if (are(b, f, b))
    run(brain, single, brain);
  else if (are(h, f, h))
    run(half, single, half);
  else if (are(f, f, b))
    run(single, single, brain);
  else if (are(f, f, h))
    run(single, single, half);
  else
    return false;
  return true;
}

template <typename X, typename S, typename O, int kMode>
void forward(const LayerNormLaunch &launch, const fastformer_layer_norm_fwd_args &a,
             cudaStream_t stream) {
  layer_norm_fwd_kernel<X, S, O, kMode>
      <<<static_cast<unsigned>(launch.blocks), launch.threads, 0, stream>>>(
          static_cast<const X *>(a.x), static_cast<const S *>(a.residual), a.weight, a.bias,
          static_cast<S *>(a.new_residual), static_cast<O *>(a.normed), a.mean, a.rstd, a.rng, a.N,
          static_cast<int>(a.C), a.eps, a.site, a.threshold, a.scale);
}

template <typename X, typename S, typename O, int kMode>
void backward(const LayerNormLaunch &launch, const fastformer_layer_norm_bwd_args &a,
              unsigned *tickets, cudaStream_t stream) {
  layer_norm_bwd_kernel<X, S, O, kMode>
      <<<static_cast<unsigned>(launch.blocks), launch.threads, 0, stream>>>(
          static_cast<const O *>(a.grad_normed), static_cast<const S *>(a.grad_new_residual),
          static_cast<const S *>(a.rows), a.weight, a.mean, a.rstd, static_cast<X *>(a.grad_x),
          static_cast<S *>(a.grad_rows), a.grad_weight, a.grad_bias, a.sums, tickets, a.rng, a.N,
          static_cast<int>(a.C), a.site, a.threshold, a.scale, a.weight_type);
}

} // namespace
} // namespace fastformer

extern "C" int fastformer_layer_norm_takes(int x, int residual, int normed) {
  return fastformer::with_types(x, residual, normed, [](auto, auto, auto) {});
}

extern "C" int64_t fastformer_layer_norm_max_cols() { return fastformer::kLayerNormMaxCols; }

extern "C" int64_t fastformer_layer_norm_scratch(int64_t N, int64_t C) {
  using namespace fastformer;
  return layer_norm_sums(N) * 2 * C + kLayerNormTickets;
}

extern "C" int fastformer_layer_norm_fwd(const fastformer_layer_norm_fwd_args *args,
                                         fastformer_stream stream) {
  using namespace fastformer;
  const fastformer_layer_norm_fwd_args &a = *args;
  if (a.N == 0 || a.C == 0)
    return cudaSuccess;
  const LayerNormLaunch launch =
      layer_norm_launch(a.N, a.C, a.x_type || a.residual_type || a.normed_type,
                        address(a.x) | address(a.residual) | address(a.weight) | address(a.bias) |
                            address(a.new_residual) | address(a.normed),
                        false);
  const bool known =
      with_types(a.x_type, a.residual_type, a.normed_type, [&](auto x, auto s, auto o) {
        using X = decltype(x);
        using S = decltype(s);
        using O = decltype(o);
        if (launch.mode == kLayerNormWarp)
          forward<X, S, O, kLayerNormWarp>(launch, a, stream);
        else if (launch.mode == kLayerNormBlock)
          forward<X, S, O, kLayerNormBlock>(launch, a, stream);
        else
          forward<X, S, O, kLayerNormScalar>(launch, a, stream);
      });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

extern "C" int fastformer_layer_norm_bwd(const fastformer_layer_norm_bwd_args *args,
                                         fastformer_stream stream) {
  using namespace fastformer;
  const fastformer_layer_norm_bwd_args &a = *args;
  if (a.C == 0)
    return cudaSuccess;
  const LayerNormLaunch launch = layer_norm_launch(
      a.N, a.C, a.x_type || a.residual_type || a.normed_type,
      address(a.grad_normed) | address(a.grad_new_residual) | address(a.rows) | address(a.weight) |
          address(a.grad_x) | address(a.grad_rows) | address(a.sums),
      true);
  unsigned *tickets;
  auto *const scratch = reinterpret_cast<unsigned *>(a.sums + layer_norm_sums(a.N) * 2 * a.C);
  if (const cudaError_t error = find_tickets(scratch, kLayerNormTickets, stream, &tickets))
    return error;
  const bool known =
      with_types(a.x_type, a.residual_type, a.normed_type, [&](auto x, auto s, auto o) {
        using X = decltype(x);
        using S = decltype(s);
        using O = decltype(o);
        if (launch.mode == kLayerNormWarp)
          backward<X, S, O, kLayerNormWarp>(launch, a, tickets, stream);
        else if (launch.mode == kLayerNormBlock)
          backward<X, S, O, kLayerNormBlock>(launch, a, tickets, stream);
        else
          backward<X, S, O, kLayerNormScalar>(launch, a, tickets, stream);
      });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}
