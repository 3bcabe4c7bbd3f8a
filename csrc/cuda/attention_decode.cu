// Attention of few queries to many keys on the GPU, as when tokens are generated one by one.
//
// Its time is that of reading the keys and values. So each of them is read once, 16 bytes a lane,
// straight into registers: eight or sixteen lanes hold a key, a warp several of them, and all of a
// block a few for each lane, on their way at the same time. One head has too few keys for a GPU's
// multiprocessors, hence they are split into chunks, a block for each; a second launch adds the
// chunks in order (Dao et al., "Flash-Decoding for long-context inference", 2023). Where there are
// more than four queries, the blocks of every four read the same keys, at the same time, so that
// all but the first find them in the cache.
//
// B sequences, T query tokens, S key tokens, H heads, D head dim.
#include "cuda/attention_decode.h"
#include "cuda/chunk.cuh"
#include "cuda/launchers.h"

namespace fastformer {
namespace {

constexpr int kCols = kDecodeCols, kThreads = kDecodeThreads, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLn2 = 0.693147180559945309f, kLog2E = 1.44269504088896341f;

// The columns of a lane as they lie in memory.
template <typename Element> struct Columns {
  static constexpr int kWords = kCols * sizeof(Element) / 16;

  __device__ __forceinline__ Columns() {}
  __device__ __forceinline__ explicit Columns(const Element *from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[i] = reinterpret_cast<const uint4 *>(from)[i];
  }

  __device__ __forceinline__ void get(float (&values)[kCols]) const {
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      values[j] = to_float(x[j]);
  }

  union {
    uint4 words[kWords];
    Element x[kCols];
  };
};

template <typename Element>
__device__ __forceinline__ void store(Element *to, const float (&values)[kCols]) {
  Columns<Element> columns;
#pragma unroll
  for (int j = 0; j < kCols; ++j)
    columns.x[j] = from_float<Element>(values[j]);
#pragma unroll
  for (int i = 0; i < columns.kWords; ++i)
    reinterpret_cast<uint4 *>(to)[i] = columns.words[i];
}

// A softmax that has seen some of the keys: the largest of their scores, which are logarithms to
// the base 2, the sum of the weights beside that one, and the values added up with these weights.
struct Softmax {
  float top = -INFINITY, sum = 0.0f, out[kCols] = {};

  // Beside which all weights are finite, also where no key has been seen.
  static __device__ __forceinline__ float base(float top) { return top == -INFINITY ? 0.0f : top; }

  __device__ __forceinline__ void raise(float to) {
    const float factor = exp2f(top - base(to));
    top = to;
    sum *= factor;
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      out[j] *= factor;
  }

  // 0 where no key has been seen.
  __device__ __forceinline__ float inverse() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
  __device__ __forceinline__ float lse2() const { return base(top) + log2f(sum); }
};

// The sum over neighbouring lanes, `kLanes` of them, in all of them.
template <int kLanes> __device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes >>= 1)
    x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}

// Puts together what the groups of `kLanes` lanes of a warp have seen.
template <int kLanes> __device__ __forceinline__ void merge_groups(Softmax &state) {
  float top = state.top;
#pragma unroll
  for (int lanes = 16; lanes >= kLanes; lanes >>= 1)
    top = fmaxf(top, __shfl_xor_sync(kAll, top, lanes));
  state.raise(top);
#pragma unroll
  for (int lanes = 16; lanes >= kLanes; lanes >>= 1) {
    state.sum += __shfl_xor_sync(kAll, state.sum, lanes);
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      state.out[j] += __shfl_xor_sync(kAll, state.out[j], lanes);
  }
}

// A block has a head, a chunk of its keys and `kQueries` queries. Strides are in elements. With one
// chunk it writes out and lse, else what its chunk makes of them: partial_out (chunks, B, T, H, D)
// and partial_lse2 (chunks, B, T, H), to the base 2. The blocks of a multiprocessor are as many as
// there are registers for.
template <typename Element, int kLanes, int kQueries>
__global__ void __launch_bounds__(kThreads, kQueries == 1 ? 6 : 3)
    attention_decode_kernel(const Element *__restrict__ q, const Element *__restrict__ k,
                            const Element *__restrict__ v, const int32_t *__restrict__ key_lengths,
                            Element *__restrict__ out, float *__restrict__ lse,
                            float *__restrict__ partial_out, float *__restrict__ partial_lse2,
                            fastformer_strides of_q, fastformer_strides of_k,
                            fastformer_strides of_v, int64_t rows, int T, int S, int H, int D,
                            int chunk, int chunks, int causal, float scale_log2) {
  constexpr int kGroups = kThreads / kLanes;            // keys side by side
  constexpr int kUnroll = sizeof(Element) == 2 ? 4 : 2; // of a lane: 8 loads on their way
  static_assert(kDecodeChunkUnit % (kGroups * kUnroll) == 0, "a chunk has whole steps");
  const unsigned tiles = (T + kQueries - 1) / kQueries;
  unsigned at = blockIdx.x; // blocks of the same keys are neighbours, then those of other heads
  const int first = static_cast<int>(at % tiles) * kQueries;
  at /= tiles;
  const int h = static_cast<int>(at % H);
  at /= H;
  const int part = static_cast<int>(at % chunks);
  const int64_t b = at / chunks;

  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, col = lane * kCols;
  const bool has_columns = col < D;
  // Lanes beyond D read columns of others, which costs nothing, and keep out of the sums.
  const int col_read = has_columns ? col : 0;
  q += b * of_q.b + h * of_q.h + col_read;
  k += b * of_k.b + h * of_k.h + col_read;
  v += b * of_v.b + h * of_v.h + col_read;

  // Query t sees the keys before S, those before the sequence's length, and, causal, those up to
  // the one at its own place counted from the end.
  const int length = key_lengths ? max(0, min(S, key_lengths[b])) : S;
  int seen[kQueries];
  float query[kQueries][kCols];
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    const int t = min(first + i, T - 1); // what is beyond the last is not stored
    seen[i] = causal ? min(length, t + S - T + 1) : length;
    Columns<Element>(q + t * of_q.t).get(query[i]);
  }
  const int begin = part * chunk, end = min(begin + chunk, seen[kQueries - 1]);

  // The keys, then the values of the next step are on their way while this one is worked on.
  constexpr int kStep = kGroups * kUnroll;
  Columns<Element> key[kUnroll], value[kUnroll];
  const auto read = [&](Columns<Element>(&to)[kUnroll], const Element *from, int64_t stride,
                        int start) {
    if (start < end) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int s = min(start + u * kGroups + group, end - 1); // the last again, unweighted
        to[u] = Columns<Element>(from + s * stride);
      }
    }
  };
  read(key, k, of_k.t, begin);
  read(value, v, of_v.t, begin);
  Softmax state[kQueries];
  for (int start = begin; start < end; start += kStep) {
    float weight[kQueries][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int s = start + u * kGroups + group;
      float x[kCols];
      key[u].get(x);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        float product = 0.0f;
#pragma unroll
        for (int j = 0; j < kCols; ++j)
          product += query[i][j] * x[j];
        product = lane_sum<kLanes>(has_columns ? product : 0.0f);
        weight[i][u] = s < min(end, seen[i]) ? product * scale_log2 : -INFINITY;
      }
    }
    read(key, k, of_k.t, start + kStep);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      float top = state[i].top;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        top = fmaxf(top, weight[i][u]);
      state[i].raise(top);
      const float base = Softmax::base(top);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        weight[i][u] = exp2f(weight[i][u] - base);
        state[i].sum += weight[i][u];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kCols];
      value[u].get(x);
#pragma unroll
      for (int i = 0; i < kQueries; ++i)
#pragma unroll
        for (int j = 0; j < kCols; ++j)
          state[i].out[j] += weight[i][u] * x[j];
    }
    read(value, v, of_v.t, start + kStep);
  }

  // The groups of each warp, then the warps one after another.
  __shared__ alignas(16) float warp_out[kWarps][kQueries][kLanes * kCols];
  __shared__ float warp_top[kWarps][kQueries], warp_sum[kWarps][kQueries];
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    merge_groups<kLanes>(state[i]);
    if (threadIdx.x % 32 < kLanes)
      store(warp_out[warp][i] + col, state[i].out);
    if (threadIdx.x % 32 == 0) {
      warp_top[warp][i] = state[i].top;
      warp_sum[warp][i] = state[i].sum;
    }
  }
  __syncthreads();
  const int i = group, t = first + i;
  if (i >= kQueries || t >= T)
    return;
  Softmax all;
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    all.top = fmaxf(all.top, warp_top[w][i]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float factor = exp2f(warp_top[w][i] - Softmax::base(all.top));
    float x[kCols];
    Columns<float>(warp_out[w][i] + col).get(x);
    all.sum += factor * warp_sum[w][i];
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      all.out[j] += factor * x[j];
  }
  const float inverse = all.inverse();
#pragma unroll
  for (int j = 0; j < kCols; ++j)
    all.out[j] *= inverse;
  const int64_t row = (b * T + t) * H + h;
  if (chunks == 1) {
    if (has_columns)
      store(out + row * D + col, all.out);
    if (lane == 0)
      lse[(b * H + h) * T + t] = all.lse2() * kLn2;
  } else {
    const int64_t partial = part * rows + row;
    if (has_columns)
      store(partial_out + partial * D + col, all.out);
    if (lane == 0)
      partial_lse2[partial] = all.lse2();
  }
}

// Sums the chunks of a row, (b * T + t) * H + h, each weighted by its share of the softmax's sum.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    attention_decode_merge_kernel(const float *__restrict__ partial_out,
                                  const float *__restrict__ partial_lse2, Element *__restrict__ out,
                                  float *__restrict__ lse, int64_t rows, int T, int H, int D,
                                  int chunks) {
  constexpr int kLanes = kThreads / kDecodeMergeRows;
  constexpr int kPerLane = kDecodeMaxChunks / kLanes;
  const int lane = threadIdx.x % kLanes, col = lane * kCols;
  const int col_read = col < D ? col : 0;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kDecodeMergeRows + threadIdx.x / kLanes;
  const int64_t row = min(place, rows - 1); // those beyond are here to take part in shuffles
  float weight[kPerLane], top = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = i * kLanes + lane;
    weight[i] = c < chunks ? partial_lse2[c * rows + row] : -INFINITY;
    top = fmaxf(top, weight[i]);
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes >>= 1)
    top = fmaxf(top, __shfl_xor_sync(kAll, top, lanes));
  const float base = Softmax::base(top);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    weight[i] = exp2f(weight[i] - base);
    sum += weight[i];
  }
  sum = lane_sum<kLanes>(sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  float total[kCols] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int count = min(kLanes, chunks - i * kLanes);
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      const float share = __shfl_sync(kAll, weight[i], j, kLanes) * inverse;
      float x[kCols];
      Columns<float>(partial_out + ((i * kLanes + j) * rows + row) * D + col_read).get(x);
#pragma unroll
      for (int n = 0; n < kCols; ++n)
        total[n] += share * x[n];
    }
  }
  if (place >= rows)
    return;
  if (col < D)
    store(out + row * D + col, total);
  if (lane == 0) {
    const int64_t token = row / H, h = row % H;
    lse[(token / T * H + h) * T + token % T] = (base + log2f(sum)) * kLn2;
  }
}

template <typename Element>
cudaError_t run(const fastformer_attention_decode_args &a, cudaStream_t stream) {
  const DecodeLaunch launch = decode_launch(a.B, a.T, a.S, a.H, a.D);
  if (launch.blocks == 0)
    return cudaSuccess;
  const int64_t rows = a.B * a.T * a.H;
  const int T = static_cast<int>(a.T), S = static_cast<int>(a.S), H = static_cast<int>(a.H),
            D = static_cast<int>(a.D), chunks = static_cast<int>(launch.chunks);
  float *lse2 = chunks > 1 ? a.scratch + chunks * rows * D : nullptr;
  const bool one = launch.queries == 1;
  const auto kernel = launch.lanes == 8 ? one ? attention_decode_kernel<Element, 8, 1>
                                              : attention_decode_kernel<Element, 8, kDecodeQueries>
                      : one             ? attention_decode_kernel<Element, 16, 1>
                                        : attention_decode_kernel<Element, 16, kDecodeQueries>;
  kernel<<<static_cast<unsigned>(launch.blocks), launch.threads, 0, stream>>>(
      static_cast<const Element *>(a.q), static_cast<const Element *>(a.k),
      static_cast<const Element *>(a.v), a.key_lengths, static_cast<Element *>(a.out), a.lse,
      a.scratch, lse2, a.of_q, a.of_k, a.of_v, rows, T, S, H, D, static_cast<int>(launch.chunk),
      chunks, a.causal, a.scale * kLog2E);
  if (const cudaError_t error = cudaGetLastError())
    return error;
  if (chunks == 1)
    return cudaSuccess;
  attention_decode_merge_kernel<Element>
      <<<static_cast<unsigned>(launch.merge_blocks), launch.threads, 0, stream>>>(
          a.scratch, lse2, static_cast<Element *>(a.out), a.lse, rows, T, H, D, chunks);
  return cudaGetLastError();
}

} // namespace
} // namespace fastformer

extern "C" int fastformer_attention_decode(const fastformer_attention_decode_args *args,
                                           fastformer_stream stream) {
  using namespace fastformer;
  switch (args->type) {
  case FASTFORMER_FLOAT32:
    return run<float>(*args, stream);
  case FASTFORMER_BFLOAT16:
    return run<__nv_bfloat16>(*args, stream);
  case FASTFORMER_FLOAT16:
    return run<__half>(*args, stream);
  }
  return cudaErrorInvalidValue;
}
