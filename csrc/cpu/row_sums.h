// Column sums over many rows, such as the gradient of a bias: groups of rows make the partial sum
// of a block, and the blocks are added in order. So the result does not depend on the number of
// threads, and no long chain of additions loses digits.
#pragma once
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

// Rows, or blocks, that are added up before they join the sum.
constexpr int kRows = 8;

// out[col] = the sum over blocks of partials[block * stride + col].
template <class T>
void add_blocks(void *out, const float *partials, int64_t blocks, int64_t stride, int64_t cols) {
  T *sums = static_cast<T *>(out);
  for_each_vec(0, cols, [&](int64_t j, auto n, int) {
    Vec sum = zero();
    for (int64_t first = 0; first < blocks; first += kRows) {
      const int64_t last = blocks - first < kRows ? blocks : first + kRows;
      Vec group = zero();
      for (int64_t block = first; block < last; ++block)
        group += load(partials + block * stride + j, n);
      sum += group;
    }
    store(sums + j, sum, n);
  });
}

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
