// Column sums over many rows, such as the gradient of a bias: groups of rows make the partial sum
// of a block, and the blocks are added in order. So the result does not depend on the number of
// threads, and no long chain of additions loses digits.
#pragma once
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

// Rows, or blocks, that are added up before they join the sum.
constexpr int kRows = 8;

// The sum of term(i) over i in [first, last), in order.
template <class F> FASTFORMER_INLINE Vec sum_in_groups(int64_t first, int64_t last, const F &term) {
  Vec sum = zero();
  for (; first < last; first += kRows) {
    const int64_t end = last - first < kRows ? last : first + kRows;
    Vec group = zero();
    for (int64_t i = first; i < end; ++i)
      group += term(i);
    sum += group;
  }
  return sum;
}

// out[col] = the sum over blocks of partials[block * stride + col].
template <class T>
void add_blocks(void *out, const float *partials, int64_t blocks, int64_t stride, int64_t cols) {
  T *sums = static_cast<T *>(out);
  for_each_vec(0, cols, [&](int64_t j, auto n, int) {
    const auto term = [&](int64_t block) { return load(partials + block * stride + j, n); };
    store(sums + j, sum_in_groups(0, blocks, term), n);
  });
}

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
