// LayerNorm of bf16 rows, forward and backward, with accesses of 16 bytes: C is a multiple of 8.
#include <cstdint>
#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

constexpr int kVec = 8; // elements in 16 bytes

union Vec {
  uint4 bits;
  bf16 x[kVec];
};

__device__ __forceinline__ Vec load_vec(const bf16 *p) {
  Vec v;
  v.bits = *reinterpret_cast<const uint4 *>(p);
  return v;
}

__device__ __forceinline__ void load_floats(float (&x)[kVec], const float *p) {
#pragma unroll
  for (int j = 0; j < kVec; j += 4)
    *reinterpret_cast<float4 *>(x + j) = *reinterpret_cast<const float4 *>(p + j);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1)
    v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// Two sums over the block, in every thread.
template <int kWarps> __device__ __forceinline__ float2 block_sum(float a, float b) {
  __shared__ float2 partial[kWarps];
  __shared__ float2 total;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  a = warp_sum(a);
  b = warp_sum(b);
  if (lane == 0)
    partial[warp] = make_float2(a, b);
  __syncthreads();
  if (warp == 0) {
    const float2 p = lane < kWarps ? partial[lane] : make_float2(0.0f, 0.0f);
    a = warp_sum(p.x);
    b = warp_sum(p.y);
    if (lane == 0)
      total = make_float2(a, b);
  }
#ifndef BUG_TOTAL_NOT_AWAITED
  __syncthreads();
#endif
  return total; // the next call writes it after a barrier of its own
}

// One block per row.
template <int kWarps>
__global__ void __launch_bounds__(kWarps * 32)
    layer_norm_fwd_kernel(const bf16 *__restrict__ x, const float *__restrict__ weight,
                          const float *__restrict__ bias, bf16 *__restrict__ y,
                          float *__restrict__ mean, float *__restrict__ rstd, int C, float eps) {
  constexpr int kStep = kWarps * 32 * kVec;
  const bf16 *row = x + static_cast<size_t>(blockIdx.x) * C;
  const int col0 = threadIdx.x * kVec;
  float sum = 0, squares = 0;
  for (int col = col0; col < C; col += kStep) {
    const Vec v = load_vec(row + col);
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      sum += __bfloat162float(v.x[j]);
  }
  const float mu = block_sum<kWarps>(sum, 0.0f).x / C;
  for (int col = col0; col < C; col += kStep) {
    const Vec v = load_vec(row + col);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float d = __bfloat162float(v.x[j]) - mu;
      squares += d * d;
    }
  }
  const float scale = rsqrtf(block_sum<kWarps>(squares, 0.0f).x / C + eps);
  for (int col = col0; col < C; col += kStep) {
    const Vec v = load_vec(row + col);
    alignas(16) float w[kVec], b[kVec];
    load_floats(w, weight + col);
    load_floats(b, bias + col);
    Vec out;
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      out.x[j] = __float2bfloat16((__bfloat162float(v.x[j]) - mu) * scale * w[j] + b[j]);
    *reinterpret_cast<uint4 *>(y + static_cast<size_t>(blockIdx.x) * C + col) = out.bits;
  }
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = mu;
    rstd[blockIdx.x] = scale;
  }
}

// A block walks `rows` rows and adds its share to the gradients of weight and bias at the end.
// C is at most 8 times the number of threads.
template <int kWarps>
__global__ void __launch_bounds__(kWarps * 32)
    layer_norm_bwd_kernel(const bf16 *__restrict__ x, const float *__restrict__ weight,
                          const bf16 *__restrict__ grad_out, const float *__restrict__ mean,
                          const float *__restrict__ rstd, bf16 *__restrict__ grad_x,
                          float *grad_weight, float *grad_bias, int M, int C, int rows) {
  const int col = threadIdx.x * kVec;
  const bool active = col < C;
  alignas(16) float w[kVec] = {};
  float sum_weight[kVec] = {}, sum_bias[kVec] = {};
  if (active)
    load_floats(w, weight + col);
  for (int r = 0; r < rows; ++r) {
    const int row = blockIdx.x * rows + r;
    if (row >= M)
      break;
    const size_t at = static_cast<size_t>(row) * C + col;
    const float mu = mean[row], scale = rstd[row];
    Vec v, g, out;
    v.bits = g.bits = make_uint4(0, 0, 0, 0);
    if (active) {
      v = load_vec(x + at);
      g = load_vec(grad_out + at);
    }
    float normal[kVec], weighted[kVec], sum_normal = 0, sum = 0;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float grad = __bfloat162float(g.x[j]);
      normal[j] = active ? (__bfloat162float(v.x[j]) - mu) * scale : 0.0f;
      weighted[j] = w[j] * grad;
      sum_normal += normal[j] * weighted[j];
      sum += weighted[j];
      sum_weight[j] += grad * normal[j];
      sum_bias[j] += grad;
    }
    const float2 total = block_sum<kWarps>(sum_normal, sum);
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      out.x[j] =
          __float2bfloat16((weighted[j] - (normal[j] * (total.x / C) + total.y / C)) * scale);
    if (active)
      *reinterpret_cast<uint4 *>(grad_x + at) = out.bits;
  }
  if (active)
    for (int j = 0; j < kVec; ++j) {
      atomicAdd(grad_weight + col + j, sum_weight[j]);
      atomicAdd(grad_bias + col + j, sum_bias[j]);
    }
}

template __global__ void layer_norm_fwd_kernel<4>(const bf16 *, const float *, const float *,
                                                  bf16 *, float *, float *, int, float);
template __global__ void layer_norm_bwd_kernel<4>(const bf16 *, const float *, const bf16 *,
                                                  const float *, const float *, bf16 *, float *,
                                                  float *, int, int, int);
