// LayerNorm on the CPU: a row stays in the first cache from its sum to its normalised values.
#include "cpu/layer_norm.h"
#include "cpu/philox_vec.h"
#include "cpu/row_sums.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int kUnroll = 4;

// Rows of the backward pass whose columns are walked together, so that sums over rows stay in
// registers; few, as each has five streams of memory.
constexpr int kRowsTogether = 4;

FASTFORMER_INLINE float total(const Vec (&sums)[kUnroll]) {
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Columns between two draws of a mask; a whole row where nothing is dropped.
FASTFORMER_INLINE int64_t chunk_size(const Dropout &dropout, int64_t C) {
  return dropout.threshold == 0 ? C : kKeepCols;
}

// Writes residual + dropout(x) and returns the sum of what was written.
template <class X, class S>
FASTFORMER_INLINE float add_row(S *out, const X *x, const S *residual, int64_t C,
                                const Dropout &dropout, int64_t row) {
  uint8_t keep[kKeepCols];
  Vec sums[kUnroll] = {};
  const Vec scale = splat(dropout.scale);
  const int64_t chunk = chunk_size(dropout, C);
  for (int64_t begin = 0; begin < C; begin += chunk) {
    const int64_t end = C - begin < chunk ? C : begin + chunk;
    if (dropout.threshold == 0) {
      for_each_vec<kUnroll>(begin, end, [&](int64_t j, auto n, int i) {
        const Vec v = load(residual + j, n) + load(x + j, n);
        store(out + j, v, n);
        sums[i] += as_stored<S>(v);
      });
    } else {
      draw_keep(keep, dropout, row, begin);
      for_each_vec<kUnroll>(begin, end, [&](int64_t j, auto n, int i) {
        const Vec kept = keep_where(load_mask(keep + j - begin), load(x + j, n));
        const Vec v = fma(kept, scale, load(residual + j, n));
        store(out + j, v, n);
        sums[i] += as_stored<S>(v);
      });
    }
  }
  return total(sums);
}

template <class S> FASTFORMER_INLINE float add_up(const S *rows, int64_t C) {
  Vec sums[kUnroll] = {};
  for_each_vec<kUnroll>(0, C, [&](int64_t j, auto n, int i) { sums[i] += load(rows + j, n); });
  return total(sums);
}

template <bool kAdd, class X, class S, class O>
void forward(const LayerNormForward &a, int64_t begin, int64_t end) {
  const int64_t C = a.C;
  const float count = static_cast<float>(C);
  for (int64_t row = begin; row < end; ++row) {
    const S *rows = static_cast<const S *>(a.residual) + row * C;
    float row_sum;
    if constexpr (kAdd) {
      S *new_residual = static_cast<S *>(a.new_residual) + row * C;
      const X *x = static_cast<const X *>(a.x) + row * C;
      row_sum = add_row(new_residual, x, rows, C, a.dropout, row);
      rows = new_residual;
    } else {
      row_sum = add_up(rows, C);
    }
    const float mean = row_sum / count;
    Vec squares[kUnroll] = {};
    for_each_vec<kUnroll>(0, C, [&](int64_t j, auto n, int i) {
      const Vec centred = first_lanes(load(rows + j, n) - mean, n);
      squares[i] = fma(centred, centred, squares[i]);
    });
    const float rstd = 1.0f / __builtin_sqrtf(total(squares) / count + a.eps);
    O *normed = static_cast<O *>(a.normed) + row * C;
    for_each_vec<kUnroll>(0, C, [&](int64_t j, auto n, int) {
      const Vec shift = a.bias ? load(a.bias + j, n) : zero();
      const Vec xhat = (load(rows + j, n) - mean) * rstd;
      store(normed + j, fma(xhat, load(a.weight + j, n), shift), n);
    });
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// What the gradient of one row's elements needs: xhat = (x - mean) rstd, and the means over the row
// of the weighted gradient, and of its product with xhat.
struct RowStatistics {
  float mean, rstd, grad, grad_xhat;
};

template <bool kAdd, class X, class S, class G>
FASTFORMER_INLINE RowStatistics row_statistics(const LayerNormBackward &a, int64_t row) {
  const G *grad = static_cast<const G *>(a.grad_normed) + row * a.C;
  const S *rows = static_cast<const S *>(a.rows) + row * a.C;
  const float mean = a.mean[row], rstd = a.rstd[row], count = static_cast<float>(a.C);
  Vec grads[kUnroll] = {}, products[kUnroll] = {};
  for_each_vec<kUnroll>(0, a.C, [&](int64_t j, auto n, int i) {
    const Vec weighted = load(grad + j, n) * load(a.weight + j, n);
    grads[i] += weighted;
    products[i] = fma(weighted, (load(rows + j, n) - mean) * rstd, products[i]);
    // What comes next goes through several rows at once, which the hardware does not foresee.
    const int64_t at = row * a.C + j;
    __builtin_prefetch(static_cast<S *>(a.grad_rows) + at, 1, 2);
    if constexpr (kAdd)
      __builtin_prefetch(static_cast<X *>(a.grad_x) + at, 1, 2);
    if (a.grad_new_residual)
      __builtin_prefetch(static_cast<const S *>(a.grad_new_residual) + at, 0, 2);
  });
  return {mean, rstd, total(grads) / count, total(products) / count};
}

// `count` rows from `row` on, which add to the sums (2, C) or, when `first`, begin them. Columns
// are walked for all rows at once, so that their sums stay in registers.
template <bool kAdd, class X, class S, class G>
FASTFORMER_INLINE void backward_rows(const LayerNormBackward &a, int64_t row, int count,
                                     float *sums, bool first) {
  const int64_t C = a.C;
  RowStatistics of[kRowsTogether];
  for (int r = 0; r < count; ++r)
    of[r] = row_statistics<kAdd, X, S, G>(a, row + r);
  const G *grad = static_cast<const G *>(a.grad_normed) + row * C;
  const S *rows = static_cast<const S *>(a.rows) + row * C;
  const S *grad_stream = static_cast<const S *>(a.grad_new_residual);
  grad_stream += grad_stream ? row * C : 0;
  S *grad_rows = static_cast<S *>(a.grad_rows) + row * C;
  X *grad_x = kAdd ? static_cast<X *>(a.grad_x) + row * C : nullptr;
  uint8_t keep[kRowsTogether][kKeepCols];
  const Vec scale = splat(a.dropout.scale);
  const bool drops = kAdd && a.dropout.threshold != 0;
  const int64_t chunk = chunk_size(a.dropout, C);
  for (int64_t begin = 0; begin < C; begin += chunk) {
    const int64_t end = C - begin < chunk ? C : begin + chunk;
    for (int r = 0; r < count && drops; ++r)
      draw_keep(keep[r], a.dropout, row + r, begin);
    for_each_vec(begin, end, [&](int64_t j, auto n, int) {
      Vec for_weight = zero(), for_bias = zero();
      const Vec weight = load(a.weight + j, n);
      for (int r = 0; r < count; ++r) {
        const int64_t at = r * C + j;
        const Vec g = load(grad + at, n);
        const Vec xhat = (load(rows + at, n) - of[r].mean) * of[r].rstd;
        for_weight = fma(g, xhat, for_weight);
        for_bias += g;
        const Vec centred = fma(xhat, splat(-of[r].grad_xhat), unfused(g * weight) - of[r].grad);
        const Vec passed = grad_stream ? load(grad_stream + at, n) : zero();
        const Vec d = fma(centred, splat(of[r].rstd), passed);
        store(grad_rows + at, d, n);
        if constexpr (kAdd) {
          const Vec dropped = drops ? keep_where(load_mask(keep[r] + j - begin), d) * scale : d;
          store(grad_x + at, dropped, n);
        }
      }
      store(sums + j, first ? for_weight : load(sums + j, n) + for_weight, n);
      store(sums + C + j, first ? for_bias : load(sums + C + j, n) + for_bias, n);
    });
  }
}

template <bool kAdd, class X, class S, class G>
void backward(const LayerNormBackward &a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float *sums = a.partials + block * 2 * a.C;
    const int64_t first = block * a.rows_per_block;
    const int64_t last = a.N - first < a.rows_per_block ? a.N : first + a.rows_per_block;
    for (int64_t row = first; row < last; row += kRowsTogether) {
      const int count = last - row < kRowsTogether ? static_cast<int>(last - row) : kRowsTogether;
      backward_rows<kAdd, X, S, G>(a, row, count, sums, row == first);
    }
  }
}

} // namespace

#define FASTFORMER_BY_NORMED(KERNEL, ADD, X, S) {KERNEL<ADD, X, S, float>, KERNEL<ADD, X, S, bf16>}
#define FASTFORMER_BY_ROWS(KERNEL, ADD, X)                                                         \
  {FASTFORMER_BY_NORMED(KERNEL, ADD, X, float), FASTFORMER_BY_NORMED(KERNEL, ADD, X, bf16)}
#define FASTFORMER_BY_X(KERNEL)                                                                    \
  {FASTFORMER_BY_ROWS(KERNEL, true, float), FASTFORMER_BY_ROWS(KERNEL, true, bf16)}

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels = {
    FASTFORMER_BY_ROWS(forward, false, float),
    FASTFORMER_BY_X(forward),
    FASTFORMER_BY_ROWS(backward, false, float),
    FASTFORMER_BY_X(backward),
};

} // namespace fastformer::cpu::FASTFORMER_ISA
