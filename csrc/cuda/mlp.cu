// What lies between the matrix products of the feed-forward layer: GELU and dropout; on the way
// back their derivatives, the hidden activation once more (for the gradient of w2) and the column
// sums that are the gradients of the biases.
//
// Memory bounds all of them, so each element is read and written once, 16 bytes at a time. A block
// has 256 columns of some rows, and its warps these rows in turn. Of column sums a block leaves its
// own to a second kernel, which adds those of all blocks in order.
#include "cuda/chunk.cuh"
#include "cuda/launchers.h"
#include "cuda/mlp.h"

#include <type_traits>

namespace fastformer {
namespace {

static_assert(kMlpTileCols == 32 * kChunk && kMlpTileCols == kMlpThreads);

// One instruction each: the library's add some for denormal numbers, as good as zero here.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Gelu {
  float value, slope;
};

template <bool kTanh> __device__ __forceinline__ Gelu gelu(float x) {
  constexpr float kLog2E = 1.44269504f;
  float share, slope; // the share of x that is the value
  if constexpr (kTanh) {
    // sqrt(2 / pi) (x + 0.044715 x^3) is half of the argument of a sigmoid. Beyond 100 nothing
    // changes, but the cube of a large x would overflow.
    constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;
    const float square = fminf(x * x, 1e4f);
    // Of the negative size, which cannot overflow; the slope of a sigmoid is the same at both.
    const float e = exp2_approx(-kLog2E * fabsf(x * (kLinear + kCubic * square)));
    const float r = reciprocal_approx(1.0f + e), tail = e * r;
    share = x < 0.0f ? tail : r;
    slope = share + x * (tail * r) * (kLinear + 3.0f * kCubic * square);
  } else {
    // The normal distribution to 8e-8 (Abramowitz and Stegun, 26.2.17): unlike erff it has no
    // branches, and its exponential is the one of the slope.
    constexpr float kInvSqrt2Pi = 0.398942280f;
    const float e = exp2_approx(-0.5f * kLog2E * (x * x));
    const float t = reciprocal_approx(1.0f + 0.231641888f * fabsf(x));
    float tail = (0.530702715f * t - 0.726576014f) * t + 0.710706871f;
    tail = ((tail * t - 0.142248368f) * t + 0.127414796f) * t * e;
    share = x < 0.0f ? tail : 1.0f - tail;
    slope = share + x * (kInvSqrt2Pi * e);
  }
  return {x * share, slope};
}

// The elements of a thread: eight columns, of every eighth row of its block.
struct Tile {
  __device__ Tile(int64_t N, int F, int64_t rows_per_block) {
    const unsigned tiles = (F + kMlpTileCols - 1) / kMlpTileCols;
    row_block = blockIdx.x / tiles;
    first_col = static_cast<int>(blockIdx.x % tiles) * kMlpTileCols;
    col = first_col + static_cast<int>(threadIdx.x % 32) * kChunk;
    row = row_block * rows_per_block + threadIdx.x / 32;
    end = (row_block + 1) * rows_per_block;
    end = end < N ? end : N;
  }

  int64_t row_block, row, end;
  int first_col, col;
};

// rng null: nothing is dropped.
template <typename T, bool kTanh, bool kWide>
__global__ void __launch_bounds__(kMlpThreads)
    gelu_fwd_kernel(const T *__restrict__ pre, T *__restrict__ hidden,
                    const int64_t *__restrict__ rng, int64_t N, int F, int64_t rows_per_block,
                    int64_t site, uint32_t threshold, float scale) {
  const Tile tile(N, F, rows_per_block);
  if (tile.col >= F)
    return;
  const uint64_t seed = rng ? static_cast<uint64_t>(rng[0]) : 0;
  const uint64_t stream = rng ? static_cast<uint64_t>(rng[1]) + static_cast<uint64_t>(site) : 0;
  for (int64_t row = tile.row; row < tile.end; row += kMlpWarps) {
    float v[kChunk];
    load<kWide>(v, pre + row * F, tile.col, F);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      v[j] = gelu<kTanh>(v[j]).value;
    if (rng)
      apply_dropout(v, draw(seed, stream, row, tile.col), threshold, scale);
    store<kWide>(hidden + row * F, v, tile.col, F);
  }
}

// Stores the sums of the block's columns, to which the warps add theirs in order.
__device__ __forceinline__ void store_sums(const float (&sum)[kChunk], const Tile &tile,
                                           float *__restrict__ sums, int F) {
  __shared__ alignas(16) float partial[kMlpWarps][kMlpTileCols];
  float *mine = partial[threadIdx.x / 32] + (tile.col - tile.first_col);
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    mine[j] = sum[j];
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x), col = tile.first_col + lane;
  if (col >= F)
    return;
  float total = partial[0][lane];
#pragma unroll
  for (int warp = 1; warp < kMlpWarps; ++warp)
    total += partial[warp][lane];
  sums[tile.row_block * F + col] = total;
}

// grad: of the hidden activation on entry, of the pre-activation on return. sums (row blocks, F).
template <typename T, bool kTanh, bool kWide>
__global__ void __launch_bounds__(kMlpThreads)
    gelu_bwd_kernel(const T *__restrict__ pre, T *__restrict__ grad, T *__restrict__ hidden,
                    float *__restrict__ sums, const int64_t *__restrict__ rng, int64_t N, int F,
                    int64_t rows_per_block, int64_t site, uint32_t threshold, float scale) {
  const Tile tile(N, F, rows_per_block);
  const uint64_t seed = rng ? static_cast<uint64_t>(rng[0]) : 0;
  const uint64_t stream = rng ? static_cast<uint64_t>(rng[1]) + static_cast<uint64_t>(site) : 0;
  float sum[kChunk] = {};
  for (int64_t row = tile.row; row < tile.end; row += kMlpWarps) {
    const int64_t at = row * F;
    float v[kChunk], d[kChunk];
    load<kWide>(v, pre + at, tile.col, F);
    load<kWide>(d, grad + at, tile.col, F);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const Gelu g = gelu<kTanh>(v[j]);
      v[j] = g.value;
      d[j] *= g.slope;
    }
    if (rng) {
      const PhiloxWords words = draw(seed, stream, row, tile.col);
      apply_dropout(v, words, threshold, scale);
      apply_dropout(d, words, threshold, scale);
    }
    store<kWide>(hidden + at, v, tile.col, F);
    store<kWide>(grad + at, d, tile.col, F);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      sum[j] += d[j];
  }
  store_sums(sum, tile, sums, F);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kMlpThreads)
    column_sums_kernel(const T *__restrict__ rows, float *__restrict__ sums, int64_t N, int F,
                       int64_t rows_per_block) {
  const Tile tile(N, F, rows_per_block);
  float sum[kChunk] = {};
  for (int64_t row = tile.row; row < tile.end; row += kMlpWarps) {
    float v[kChunk];
    load<kWide>(v, rows + row * F, tile.col, F);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      sum[j] += v[j];
  }
  store_sums(sum, tile, sums, F);
}

constexpr int kSumCols = 32, kSumRows = 8;

// Adds the sums of all blocks, always in the same order: a thread those of every eighth block.
template <typename T>
__global__ void __launch_bounds__(kSumCols *kSumRows)
    add_sums_kernel(const float *__restrict__ sums, T *__restrict__ out, int row_blocks, int F) {
  __shared__ float partial[kSumRows][kSumCols];
  const int lane = threadIdx.x % kSumCols, first = threadIdx.x / kSumCols;
  const int col = blockIdx.x * kSumCols + lane;
  float sum = 0.0f;
  if (col < F)
    for (int block = first; block < row_blocks; block += kSumRows)
      sum += sums[static_cast<int64_t>(block) * F + col];
  partial[first][lane] = sum;
  __syncthreads();
  if (first == 0 && col < F) {
    for (int i = 1; i < kSumRows; ++i)
      sum += partial[i][lane];
    out[col] = from_float<T>(sum);
  }
}

uint64_t address(const void *p) { return reinterpret_cast<uint64_t>(p); }

template <typename T> struct Type {
  using Element = T;
};

// Calls `run` with the type named; other numbers are the caller's error.
template <typename F> cudaError_t with_type(int type, F run) {
  if (type == FASTFORMER_FLOAT32)
    run(Type<float>());
  else if (type == FASTFORMER_BFLOAT16)
    run(Type<__nv_bfloat16>());
  else if (type == FASTFORMER_FLOAT16)
    run(Type<__half>());
  else
    return cudaErrorInvalidValue;
  return cudaGetLastError();
}

// Calls `run` with the two as constants.
template <typename F> void with_flags(bool first, bool second, F run) {
  const std::true_type yes;
  const std::false_type no;
  if (first && second)
    run(yes, yes);
  else if (first)
    run(yes, no);
  else if (second)
    run(no, yes);
  else
    run(no, no);
}

template <typename T>
void add_sums(const float *sums, void *out, const MlpLaunch &launch, int64_t F,
              cudaStream_t stream) {
  add_sums_kernel<T>
      <<<static_cast<unsigned>((F + kSumCols - 1) / kSumCols), kSumCols * kSumRows, 0, stream>>>(
          sums, static_cast<T *>(out), static_cast<int>(launch.row_blocks), static_cast<int>(F));
}

} // namespace
} // namespace fastformer

extern "C" int64_t fastformer_mlp_sum_rows(int64_t N) {
  return fastformer::mlp_launch(N, 1, 4, 0, true).row_blocks;
}

extern "C" int fastformer_gelu_fwd(const fastformer_gelu_fwd_args *args, fastformer_stream stream) {
  using namespace fastformer;
  const fastformer_gelu_fwd_args &a = *args;
  if (a.N == 0 || a.F == 0)
    return cudaSuccess;
  return with_type(a.type, [&](auto type) {
    using T = typename decltype(type)::Element;
    const MlpLaunch launch =
        mlp_launch(a.N, a.F, sizeof(T), address(a.pre) | address(a.hidden), false);
    with_flags(a.tanh, launch.wide, [&](auto tanh, auto wide) {
      gelu_fwd_kernel<T, tanh, wide>
          <<<static_cast<unsigned>(launch.blocks), kMlpThreads, 0, stream>>>(
              static_cast<const T *>(a.pre), static_cast<T *>(a.hidden), a.rng, a.N,
              static_cast<int>(a.F), launch.rows_per_block, a.site, a.threshold, a.scale);
    });
  });
}

extern "C" int fastformer_gelu_bwd(const fastformer_gelu_bwd_args *args, fastformer_stream stream) {
  using namespace fastformer;
  const fastformer_gelu_bwd_args &a = *args;
  if (a.F == 0)
    return cudaSuccess;
  return with_type(a.type, [&](auto type) {
    using T = typename decltype(type)::Element;
    const MlpLaunch launch =
        mlp_launch(a.N, a.F, sizeof(T), address(a.pre) | address(a.grad) | address(a.hidden), true);
    if (a.N > 0)
      with_flags(a.tanh, launch.wide, [&](auto tanh, auto wide) {
        gelu_bwd_kernel<T, tanh, wide>
            <<<static_cast<unsigned>(launch.blocks), kMlpThreads, 0, stream>>>(
                static_cast<const T *>(a.pre), static_cast<T *>(a.grad), static_cast<T *>(a.hidden),
                a.sums, a.rng, a.N, static_cast<int>(a.F), launch.rows_per_block, a.site,
                a.threshold, a.scale);
      });
    add_sums<T>(a.sums, a.grad_bias, launch, a.F, stream);
  });
}

extern "C" int fastformer_column_sums(const fastformer_column_sums_args *args,
                                      fastformer_stream stream) {
  using namespace fastformer;
  const fastformer_column_sums_args &a = *args;
  if (a.F == 0)
    return cudaSuccess;
  return with_type(a.type, [&](auto type) {
    using T = typename decltype(type)::Element;
    const MlpLaunch launch = mlp_launch(a.N, a.F, sizeof(T), address(a.rows), true);
    const T *rows = static_cast<const T *>(a.rows);
    const int F = static_cast<int>(a.F);
    const auto blocks = static_cast<unsigned>(launch.blocks);
    if (a.N > 0 && launch.wide)
      column_sums_kernel<T, true>
          <<<blocks, kMlpThreads, 0, stream>>>(rows, a.sums, a.N, F, launch.rows_per_block);
    else if (a.N > 0)
      column_sums_kernel<T, false>
          <<<blocks, kMlpThreads, 0, stream>>>(rows, a.sums, a.N, F, launch.rows_per_block);
    add_sums<T>(a.sums, a.out, launch, a.F, stream);
  });
}
