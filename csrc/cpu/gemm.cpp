// A block of rows at a time against panels of B, a part of the depth after the other. Rows that lie
// ready are taken with one panel after the other: they stay in the second-level cache, the panels
// come from there or the third. Rows that have to be packed, as those of a transposed matrix and
// bfloat16 where it is multiplied as float32, are packed for a part of the depth, which stays in
// that cache too, and taken with a group of panels. A chain of additions is no longer than kDepth,
// so that float32 is as exact as MKL's; such sums are then added up.
#include "cpu/gemm.h"
#include "cpu/bf16.h"
#include "cpu/block_gemm.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int64_t kPanel = kMaxVectors * kLanes;
constexpr int64_t kMaxBlockRows = 96;
constexpr int64_t kDepth = 256; // units
constexpr int64_t kGroup = 16;  // panels whose sums share the cache with packed rows
constexpr int64_t kStep = 24;   // rows between two looks ahead

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
template <class Out> struct Result {
  Out *out;
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

// Whether T is multiplied as something wider.
template <class T> constexpr bool kWidens = sizeof(Unit<T>) > sizeof(T) * kPerUnit<Unit<T>>;

template <class T> bool packs_rows(const Gemm &g) { return kWidens<T> || g.a_col != 1; }

template <class T> int64_t group_of(const Gemm &g, int64_t pieces) {
  return !packs_rows<T>(g) ? 1 : pieces < kGroup ? pieces : kGroup;
}

constexpr int64_t kPackedRowsBytes = kMaxBlockRows * kDepth * static_cast<int64_t>(sizeof(float));

template <class T> int64_t scratch_bytes(const Gemm &g, int64_t pieces) {
  const int64_t sums = kMaxBlockRows * kPanel * static_cast<int64_t>(sizeof(float));
  return group_of<T>(g, pieces) * sums + (packs_rows<T>(g) ? kPackedRowsBytes : 0);
}

// Part of a transposed matrix, as short pieces of many of its rows: no hardware guesses where the
// next one is. So it is fetched while the part before it is multiplied, a little at a time.
struct Ahead {
  const char *next;
  int64_t stride, pieces, lines, per_step;

  template <class T>
  Ahead(const T *from, int64_t stride, int64_t pieces, int64_t length, int64_t steps)
      : next(reinterpret_cast<const char *>(from)),
        stride(stride * static_cast<int64_t>(sizeof(T))), pieces(from ? pieces : 0),
        lines((length * static_cast<int64_t>(sizeof(T)) + 63) / 64),
        per_step((pieces + steps - 1) / steps) {}

  void step() {
    const int64_t count = pieces < per_step ? pieces : per_step;
    for (int64_t i = 0; i < count; ++i, next += stride)
      for (int64_t line = 0; line < lines; ++line)
        __builtin_prefetch(next + 64 * line, 0, 2);
    pieces -= count;
  }
};

// The block of rows from `row` on times the panels [begin, end). `next_row` is where the next group
// begins, or -1.
template <class T, class Out>
void multiply_group(const Gemm &g, void *scratch, int64_t row, int64_t begin, int64_t end,
                    int64_t next_row) {
  using U = Unit<T>;
  const int64_t depth = units<T>(g.K), part = kDepth * kPerUnit<U>;
  const int64_t rows = g.M - row < g.block_rows ? g.M - row : g.block_rows;
  const T *a = static_cast<const T *>(g.a) + row * g.a_row;
  U *packed = static_cast<U *>(scratch);
  float *sums = static_cast<float *>(scratch) +
                (packs_rows<T>(g) ? kPackedRowsBytes / static_cast<int64_t>(sizeof(float)) : 0);
  Product<U> p{};
  p.ldb = kPanel;
  for (int64_t from = 0; from < depth; from += kDepth) {
    const bool is_last = depth - from <= kDepth;
    p.depth = is_last ? depth - from : kDepth;
    const int64_t k = from * kPerUnit<U>, elements = g.K - k < part ? g.K - k : part;
    if (g.a_col != 1) {
      pack_rows(a + k * g.a_col, g.a_col, elements, rows, packed, kMaxBlockRows);
      p.a = packed;
      p.a_row = 1;
      p.a_col = kMaxBlockRows;
    } else if constexpr (kWidens<T>) {
      pack_rows(a + k, g.a_row, rows, elements, packed, kDepth);
      p.a = packed;
      p.a_row = kDepth;
      p.a_col = 1;
    } else {
      p.a = reinterpret_cast<const U *>(a) + from;
      p.a_row = g.a_row / kPerUnit<U>;
      p.a_col = 1;
    }
    const int64_t next_k = is_last ? 0 : k + part;
    const T *next = is_last ? next_row < 0 ? nullptr : static_cast<const T *>(g.a) + next_row
                            : a + next_k * g.a_col;
    Ahead ahead(g.a_col != 1 ? next : nullptr, g.a_col, g.K - next_k < part ? g.K - next_k : part,
                rows, (end - begin) * ((rows + kStep - 1) / kStep));
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t col = panel * kPanel, cols = g.N - col < kPanel ? g.N - col : kPanel;
      float *sum = sums + (panel - begin) * kMaxBlockRows * kPanel;
      p.b = static_cast<const U *>(g.packed) + col * depth + from * kPanel;
      Result<Out> result = {static_cast<Out *>(g.out) + row * g.out_row + col, g.out_row,
                            from > 0 ? sum : nullptr, g.bias ? g.bias + col : nullptr, g.add};
      p.to = {sum, kPanel, from > 0};
      const bool whole = cols == kPanel;
      Product<U> step = p;
      for (int64_t left = rows; left > 0; left -= kStep) {
        const int64_t count = left < kStep ? left : kStep;
        ahead.step();
        if (is_last && whole)
          multiply(Product<U, Result<Out>>{step.a, p.a_row, p.a_col, p.b, p.ldb, result, p.depth},
                   count, kMaxVectors);
        else
          multiply(step, count, (cols + kLanes - 1) / kLanes);
        if (is_last && !whole)
          result.take_part(step.to.out, count, cols);
        step.a += count * p.a_row;
        step.to.advance(count, 0);
        result.advance(count, 0);
      }
    }
  }
}

template <class T, class Out>
void multiply(const Gemm &g, void *scratch, int64_t begin, int64_t end) {
  const int64_t panels = (g.N + kPanel - 1) / kPanel, most = group_of<T>(g, end - begin);
  while (begin < end) {
    const int64_t first = begin % panels;
    int64_t count = end - begin < most ? end - begin : most;
    count = panels - first < count ? panels - first : count;
    const int64_t row = begin / panels * g.block_rows;
    begin += count;
    multiply_group<T, Out>(g, scratch, row, first, first + count,
                           begin < end ? begin / panels * g.block_rows : -1);
  }
}

} // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {
    kPanel,
    kMaxBlockRows,
    kTileRows<kMaxVectors>,
    kWidens<bf16>,
    {pack<float>, pack<bf16>},
    {{multiply<float, float>, nullptr}, {multiply<bf16, float>, multiply<bf16, bf16>}},
    {scratch_bytes<float>, scratch_bytes<bf16>},
};

} // namespace fastformer::cpu::FASTFORMER_ISA
