// One block of rows at a time against the panels of B, all of the depth in turn: the rows of A stay
// in the second-level cache, the panels come from there or the third. A chain of additions is no
// longer than kDepth, so that float32 is as exact as MKL's; such sums are then added up.
#include "cpu/gemm.h"
#include "cpu/bf16.h"
#include "cpu/block_gemm.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int64_t kPanel = kMaxVectors * kLanes;
constexpr int64_t kMaxBlockRows = 96;
constexpr int64_t kDepth = 256; // units

template <class T> int64_t units(int64_t elements) {
  return (elements + kPerUnit<Unit<T>> - 1) / kPerUnit<Unit<T>>;
}

template <class T> void pack(const Gemm &g, int64_t begin, int64_t end) {
  const T *b = static_cast<const T *>(g.b);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t col = panel * kPanel, cols = g.N - col < kPanel ? g.N - col : kPanel;
    Unit<T> *out = static_cast<Unit<T> *>(g.packed) + col * units<T>(g.K);
    if (g.b_col == 1)
      pack_rows(b + col, g.b_row, g.K, cols, out, kPanel);
    else
      pack_columns(b + col * g.b_col, g.b_col, cols, g.K, 1.0f, out, kPanel);
  }
}

// Takes the last part of the depth and adds what else belongs to the result.
template <class T> struct Result {
  T *out;
  int64_t stride;
  const float *earlier; // the sums of the other parts (rows, kPanel), may be null
  const float *bias;    // may be null
  bool add;

  void advance(int64_t rows, int64_t vectors) {
    out += rows * stride + vectors * kLanes;
    earlier += earlier ? rows * kPanel + vectors * kLanes : 0;
    bias += bias ? vectors * kLanes : 0;
  }

  template <int M, int N> FASTFORMER_INLINE void take(Vec (&c)[M][N]) const {
    if (earlier)
      each(c, [&](Vec &x, int i, int j) { x += load(earlier + i * kPanel + j * kLanes); });
    if (bias)
      each(c, [&](Vec &x, int, int j) { x += load(bias + j * kLanes); });
    if (add)
      each(c, [&](Vec &x, int i, int j) { x += load(out + i * stride + j * kLanes); });
    each(c, [&](Vec &x, int i, int j) { store(out + i * stride + j * kLanes, x); });
  }

  template <int M, int N, class F> FASTFORMER_INLINE static void each(Vec (&c)[M][N], F f) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        f(c[i][j], i, j);
  }

  // The same for sums of which only `cols` columns exist.
  void take_part(const float *sums, int64_t rows, int64_t cols) const {
    for (int64_t i = 0; i < rows; ++i)
      for_each_vec(0, cols, [&](int64_t j, auto n, int) {
        Vec x = load(sums + i * kPanel + j);
        if (bias)
          x += load(bias + j, n);
        if (add)
          x += load(out + i * stride + j, n);
        store(out + i * stride + j, x, n);
      });
  }
};

template <class T>
void multiply(const Gemm &g, void *scratch, int64_t row, int64_t row_end, int64_t panel,
              bool fresh) {
  using U = Unit<T>;
  const int64_t depth = units<T>(g.K), rows = row_end - row;
  const int64_t col = panel * kPanel, cols = g.N - col < kPanel ? g.N - col : kPanel;
  Product<U> p{};
  if (g.a_col == 1) {
    p.a = reinterpret_cast<const U *>(static_cast<const T *>(g.a) + row * g.a_row);
    p.a_row = g.a_row / kPerUnit<U>;
    p.a_col = 1;
  } else {
    U *packed = static_cast<U *>(scratch);
    if (fresh)
      pack_rows(static_cast<const T *>(g.a) + row, g.a_col, g.K, rows, packed, kMaxBlockRows);
    p.a = packed;
    p.a_row = 1;
    p.a_col = kMaxBlockRows;
  }
  p.b = static_cast<const U *>(g.packed) + col * depth;
  p.ldb = kPanel;
  alignas(64) float sums[kMaxBlockRows * kPanel];
  const bool whole = cols == kPanel;
  int64_t left = depth;
  for (; left > (whole ? kDepth : 0); left -= p.depth) {
    p.to = {sums, kPanel, left < depth};
    p.depth = left < kDepth ? left : kDepth;
    multiply(p, rows, (cols + kLanes - 1) / kLanes);
    p.a += p.depth * p.a_col;
    p.b += p.depth * kPanel;
  }
  const Result<T> result = {static_cast<T *>(g.out) + row * g.out_row + col, g.out_row,
                            left < depth ? sums : nullptr, g.bias ? g.bias + col : nullptr, g.add};
  if (whole)
    multiply(Product<U, Result<T>>{p.a, p.a_row, p.a_col, p.b, p.ldb, result, left}, rows,
             kMaxVectors);
  else
    result.take_part(sums, rows, cols);
}

} // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {
    kPanel,
    kMaxBlockRows,
    kTileRows<kMaxVectors>,
#if defined(__AVX512BF16__)
    {sizeof(float), sizeof(bf16)},
    {pack<float>, pack<bf16>},
    {multiply<float>, multiply<bf16>},
#elif defined(__AVX512BW__)
    {sizeof(float), 0},
    {pack<float>, nullptr},
    {multiply<float>, nullptr},
#endif // with AVX2 the libraries are as fast
};

} // namespace fastformer::cpu::FASTFORMER_ISA
