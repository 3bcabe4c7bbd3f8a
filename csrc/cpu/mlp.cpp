// The passes of the feed-forward layer around its matrix products, each over memory once.
#include "cpu/mlp.h"
#include "cpu/gelu.h"
#include "cpu/philox_vec.h"
#include "cpu/row_sums.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

template <class T, bool kTanh>
void gelu_fwd(const GeluForward &a, int64_t row_begin, int64_t row_end) {
  const bool drops = a.dropout.threshold != 0;
  const int64_t chunk = drops ? kKeepCols : a.F;
  const Vec scale = splat(a.dropout.scale);
  uint8_t keep[kKeepCols];
  for (int64_t row = row_begin; row < row_end; ++row) {
    T *pre = static_cast<T *>(a.pre) + row * a.F;
    T *hidden = static_cast<T *>(a.hidden) + row * a.F;
    for (int64_t begin = 0; begin < a.F; begin += chunk) {
      const int64_t end = a.F - begin < chunk ? a.F : begin + chunk;
      if (drops)
        draw_keep(keep, a.dropout, row, begin);
      for_each_vec(begin, end, [&](int64_t j, auto n, int) {
        Vec x = load(pre + j, n);
        if (a.bias) {
          x += load(a.bias + j, n);
          store(pre + j, x, n);
        }
        Vec y = gelu<T, kTanh>(x);
        if (drops)
          y = keep_where(load_mask(keep + j - begin), y) * scale;
        store(hidden + j, y, n);
      });
    }
  }
}

// One row, whose gradient is added to `group` or, when `first`, begins it.
template <class T, bool kTanh>
FASTFORMER_INLINE void gelu_bwd_row(const GeluBackward &a, int64_t row, float *group, bool first) {
  const bool drops = a.dropout.threshold != 0;
  const int64_t chunk = drops ? kKeepCols : a.F;
  const Vec scale = splat(a.dropout.scale);
  uint8_t keep[kKeepCols];
  const T *pre = static_cast<const T *>(a.pre) + row * a.F;
  T *grad = static_cast<T *>(a.grad) + row * a.F;
  T *hidden = static_cast<T *>(a.hidden) + row * a.F;
  for (int64_t begin = 0; begin < a.F; begin += chunk) {
    const int64_t end = a.F - begin < chunk ? a.F : begin + chunk;
    if (drops)
      draw_keep(keep, a.dropout, row, begin);
    for_each_vec(begin, end, [&](int64_t j, auto n, int) {
      const GeluAndSlope at = gelu_and_slope<T, kTanh>(load(pre + j, n));
      Vec y = at.value, d = load(grad + j, n) * at.slope;
      if (drops) {
        const IntVec mask = load_mask(keep + j - begin);
        y = keep_where(mask, y) * scale;
        d = keep_where(mask, d) * scale;
      }
      store(hidden + j, y, n);
      store(grad + j, d, n);
      store(group + j, first ? d : load(group + j, n) + d, n);
    });
  }
}

template <class T, bool kTanh>
void gelu_bwd(const GeluBackward &a, int64_t block_begin, int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * a.rows_per_block;
    const int64_t last = a.N - first < a.rows_per_block ? a.N : first + a.rows_per_block;
    float *sums = a.partials + block * 2 * a.F, *group = sums + a.F;
    for (int64_t row = first; row < last; ++row) {
      const int64_t index = (row - first) % kRows;
      gelu_bwd_row<T, kTanh>(a, row, group, index == 0);
      if (index == kRows - 1 || row + 1 == last)
        for_each_vec(0, a.F, [&](int64_t j, auto n, int) {
          const Vec sum = load(group + j, n);
          store(sums + j, row - first < kRows ? sum : load(sums + j, n) + sum, n);
        });
    }
  }
}

template <class T>
void add_bias(void *rows, const float *bias, int64_t begin, int64_t end, int64_t cols) {
  for (int64_t row = begin; row < end; ++row) {
    T *out = static_cast<T *>(rows) + row * cols;
    for_each_vec(0, cols, [&](int64_t j, auto n, int) {
      store(out + j, load(out + j, n) + load(bias + j, n), n);
    });
  }
}

template <class T>
void column_sums(float *partials, const void *rows, int64_t block_begin, int64_t block_end,
                 int64_t N, int64_t cols, int64_t rows_per_block) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    float *sums = partials + block * cols;
    const int64_t first = block * rows_per_block;
    const int64_t last = N - first < rows_per_block ? N : first + rows_per_block;
    for (int64_t row = first; row < last; row += kRows) {
      const T *in = static_cast<const T *>(rows) + row * cols;
      const int count = last - row < kRows ? static_cast<int>(last - row) : kRows;
      for_each_vec(0, cols, [&](int64_t j, auto n, int) {
        Vec group = zero();
        for (int r = 0; r < count; ++r)
          group += load(in + r * cols + j, n);
        store(sums + j, row == first ? group : load(sums + j, n) + group, n);
      });
    }
  }
}

} // namespace

extern const MlpKernels mlp_kernels;
const MlpKernels mlp_kernels = {
    {{gelu_fwd<float, false>, gelu_fwd<float, true>},
     {gelu_fwd<bf16, false>, gelu_fwd<bf16, true>}},
    {{gelu_bwd<float, false>, gelu_bwd<float, true>},
     {gelu_bwd<bf16, false>, gelu_bwd<bf16, true>}},
    {add_bias<float>, add_bias<bf16>},
    {column_sums<float>, column_sums<bf16>},
    {add_blocks<float>, add_blocks<bf16>},
};

} // namespace fastformer::cpu::FASTFORMER_ISA
