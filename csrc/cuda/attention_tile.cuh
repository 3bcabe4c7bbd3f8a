// What the attention kernels share: where a head lies, rows in shared memory, the products on them.
//
// A warp multiplies 16 rows at a time, whose accumulators are arrays of [columns / 8][4]: lane
// 4 * g + t has the columns 2t and 2t + 1 of rows g (elements 0, 1) and g + 8 (elements 2, 3).
//
// T query tokens, S key tokens, H heads, D head dim.
#pragma once
#include "cuda/attention.h"
#include "cuda/launchers.h"
#include "cuda/mma.cuh"
#include "philox.h"

namespace fastformer {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr unsigned kAllLanes = 0xffffffffu;

template <int kDim>
constexpr AttentionSizes kSizes = kDim == kAttentionNarrow.dim ? kAttentionNarrow : kAttentionWide;

// Hides from the compiler that `x` is the same in every turn of a loop. All that follows from it
// would else stay in registers that the loop needs.
template <typename T> __device__ __forceinline__ void forget(T &x) { asm volatile("" : "+r"(x)); }

// Where a thread is: in which warp, and lane 4 * g + t of it.
struct Lane {
  __device__ __forceinline__ Lane() {
    unsigned thread = threadIdx.x;
    forget(thread);
    warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  }

  int warp, lane, g, t;
};

using Args = fastformer_attention_args;

// A head of a sequence, whose tokens are `first_query` and `first_key` and those after them. There
// are less than 2**31 heads; of tokens the kernels count those of all sequences only in strides,
// and, modulo 2**32, in the rows of dropout.
struct Head {
  int index, b, h;
  uint32_t first_query, first_key;
  int T, S;
  int seen;           // keys that are not padding
  bool causal, drops; // is the mask; has dropout
  float scale_log2;

  static __device__ __forceinline__ Head at(const Args &a, int index) {
    Head head;
    const int H = static_cast<int>(a.H);
    head.index = index, head.b = index / H, head.h = index % H;
    head.first_query = static_cast<uint32_t>(head.b) * a.T, head.first_key = 0;
    head.T = a.T, head.S = a.S;
    if (a.cu_seqlens_q) {
      const int32_t *q = a.cu_seqlens_q + head.b, *k = a.cu_seqlens_k + head.b;
      head.first_query = q[0], head.first_key = k[0];
      head.T = min(a.T, q[1] - q[0]), head.S = min(a.S, k[1] - k[0]);
    }
    head.causal = a.causal, head.drops = a.dropout.rng != nullptr,
    head.scale_log2 = a.scale * kLog2E;
    head.seen = a.key_lengths ? max(min(head.S, a.key_lengths[head.b]), 0) : head.S;
    return head;
  }

  // Where the rows of its tokens begin.
  template <typename T>
  __device__ __forceinline__ T *queries(const Args &a, const fastformer_attention_rows &x) const {
    return static_cast<T *>(x.data) + start(a, x, first_query);
  }
  template <typename T>
  __device__ __forceinline__ T *keys(const Args &a, const fastformer_attention_rows &x) const {
    return static_cast<T *>(x.data) + start(a, x, first_key);
  }
  __device__ __forceinline__ float *lse(const Args &a) const {
    const int64_t packed = h * a.N + first_query, padded = static_cast<int64_t>(index) * a.T;
    return a.lse + (a.cu_seqlens_q ? packed : padded);
  }

  // The number of keys that are seen by the queries before `end`.
  __device__ __forceinline__ int keys_seen_before(int end) const {
    return max(causal ? min(seen, end + S - T) : seen, 0);
  }

  // Which of the eight keys from `key` on dropout keeps for a query, a bit each. The state is read
  // anew for each draw: registers are scarcer than reads of what the cache has.
  __device__ __forceinline__ uint32_t keep_bits(const Args &a, int query, int key) const {
    const uint64_t seed = static_cast<uint64_t>(a.dropout.rng[0]);
    const uint64_t stream =
        static_cast<uint64_t>(a.dropout.rng[1]) + static_cast<uint64_t>(a.dropout.site);
    const uint32_t row = (first_query + query) * static_cast<uint32_t>(a.H) + h;
    const PhiloxWords draw = dropout_draw(seed, stream, row, key / kColsPerDraw);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kColsPerDraw; ++i)
      bits |= static_cast<uint32_t>(dropout_keep(draw, i, a.dropout.threshold)) << i;
    return bits;
  }

private:
  __device__ __forceinline__ int64_t start(const Args &a, const fastformer_attention_rows &x,
                                           uint32_t first) const {
    return (a.cu_seqlens_q ? first * x.token_stride : b * x.batch_stride) + h * x.head_stride;
  }
};

// Rows of kCols elements in shared memory, in chunks of 16 bytes.
template <int kCols> struct Rows {
  static constexpr int kChunks = kCols / 8, kBytes = 2 * kCols;

  static __device__ __forceinline__ uint32_t at(uint32_t rows, int row, int chunk) {
    return rows + row * kBytes + attention_chunk(kChunks, row, chunk) * 16;
  }

  // A lane's address for ldmatrix of 16 rows and columns, the matrices one below the other first,
  static __device__ __forceinline__ uint32_t below(uint32_t rows, int row, int lane) {
    return at(rows, row + lane % 16, lane / 16);
  }

  // or side by side first.
  static __device__ __forceinline__ uint32_t beside(uint32_t rows, int row, int lane) {
    return at(rows, row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // Such an address, moved by so many times 16 rows and 16 columns.
  static __device__ __forceinline__ uint32_t move(uint32_t address, int rows, int cols) {
    return (address ^ (cols * 32)) + rows * 16 * kBytes;
  }

  // Starts to copy rows [row, row + count) of a head; zeros from row `end` and column D on.
  template <typename T>
  static __device__ __forceinline__ void load(uint32_t rows, const T *from, int stride, int row,
                                              int count, int end, int D) {
    int i = threadIdx.x;
    for (forget(i); i < count * kChunks; i += blockDim.x) {
      const int r = i / kChunks, chunk = i % kChunks;
      const bool valid = row + r < end && chunk * 8 < D;
      const int64_t offset = valid ? static_cast<int64_t>(row + r) * stride + chunk * 8 : 0;
      cp_async<16>(at(rows, r, chunk), from + offset, valid);
    }
  }
};

// c += a b^T of 16 rows of a and kN rows of b, in shared memory.
template <typename T, int kDim, int kN>
__device__ __forceinline__ void multiply_transposed(float (&c)[kN / 8][4], uint32_t a, uint32_t b) {
#pragma unroll 4
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a_part[4];
    ldmatrix(a_part, Rows<kDim>::move(a, 0, k)); // from below()
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      uint32_t b_part[4];
      ldmatrix(b_part, Rows<kDim>::move(b, n, k)); // from beside()
      mma<T>(c[2 * n], a_part, b_part[0], b_part[1]);
      mma<T>(c[2 * n + 1], a_part, b_part[2], b_part[3]);
    }
  }
}

// c += p b of kN columns of p, in registers, and kN rows of b, in shared memory.
template <typename T, int kDim, int kN>
__device__ __forceinline__ void multiply(float (&c)[kDim / 8][4], const uint32_t (&p)[kN / 16][4],
                                         uint32_t b) {
#pragma unroll
  for (int k = 0; k < kN / 16; ++k)
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b_part[4];
      ldmatrix_transposed(b_part, Rows<kDim>::move(b, k, n)); // from below()
      mma<T>(c[2 * n], p[k], b_part[0], b_part[1]);
      mma<T>(c[2 * n + 1], p[k], b_part[2], b_part[3]);
    }
}

// Accumulators of one product as the left side of the next.
template <typename T, int kN>
__device__ __forceinline__ void round_to(uint32_t (&p)[kN / 16][4], const float (&c)[kN / 8][4]) {
#pragma unroll
  for (int k = 0; k < kN / 16; ++k)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      p[k][j] = pack<T>(c[2 * k + j / 2][j % 2 * 2], c[2 * k + j / 2][j % 2 * 2 + 1]);
}

// Stores 16 columns of 16 rows, of which the first `rows` are there, and of columns `cols`. `top`
// and `bottom` scale rows g and g + 8. A lane stores 16 bytes: a quad exchanges what its lanes
// hold.
template <typename T>
__device__ __forceinline__ void store_16x16(T *to, int stride, int rows, int cols,
                                            const float (&left)[4], const float (&right)[4],
                                            float top, float bottom) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  const uint32_t w[4] = {
      pack<T>(left[0] * top, left[1] * top), pack<T>(right[0] * top, right[1] * top),
      pack<T>(left[2] * bottom, left[3] * bottom), pack<T>(right[2] * bottom, right[3] * bottom)};
  const bool odd = t & 1, high = t & 2;
  uint32_t pairs[4]; // of lanes t & ~1 and t | 1
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? w[i] : w[i + 1], 1);
    pairs[i] = odd ? other : w[i];
    pairs[i + 1] = odd ? w[i + 1] : other;
  }
  uint4 whole;
  const uint32_t x = __shfl_xor_sync(kAllLanes, high ? pairs[0] : pairs[2], 2);
  const uint32_t y = __shfl_xor_sync(kAllLanes, high ? pairs[1] : pairs[3], 2);
  whole.x = high ? x : pairs[0];
  whole.y = high ? y : pairs[1];
  whole.z = high ? pairs[2] : x;
  whole.w = high ? pairs[3] : y;
  const int row = lane / 4 + (high ? 8 : 0), col = odd ? 8 : 0;
  if (row < rows && col < cols)
    *reinterpret_cast<uint4 *>(to + static_cast<int64_t>(row) * stride + col) = whole;
}

} // namespace
} // namespace fastformer
