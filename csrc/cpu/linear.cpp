// Bias and its gradient.
#include "cpu/linear.h"
#include "cpu/row_sums.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

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

void to_float32(float *out, const bf16 *in, int64_t begin, int64_t end) {
  for_each_vec(begin, end, [&](int64_t i, auto n, int) { store(out + i, load(in + i, n), n); });
}

void accumulate(float *out, const bf16 *in, int64_t begin, int64_t end) {
  for_each_vec(begin, end, [&](int64_t i, auto n, int) {
    store(out + i, load(out + i, n) + load(in + i, n), n);
  });
}

} // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    {add_bias<float>, add_bias<bf16>},
    {column_sums<float>, column_sums<bf16>},
    {add_blocks<float>, add_blocks<bf16>},
    to_float32,
    accumulate,
};

} // namespace fastformer::cpu::FASTFORMER_ISA
