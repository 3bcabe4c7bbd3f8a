// The gradient of an embedding's table is mostly zeros: each of its rows is written once.
#include "cpu/embedding.h"
#include "cpu/row_sums.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

template <class T>
void sum_tokens(void *out, const void *grad, const int32_t *tokens, const int32_t *starts,
                int64_t begin, int64_t end, int64_t C) {
  const T *in = static_cast<const T *>(grad);
  for (int64_t v = begin; v < end; ++v) {
    T *row = static_cast<T *>(out) + v * C;
    const int32_t first = starts[v], last = starts[v + 1];
    for_each_vec(0, C, [&](int64_t j, auto n, int) {
      Vec sum = zero();
      for (int32_t t = first; t < last; t += kRows) {
        const int count = last - t < kRows ? last - t : kRows;
        Vec group = zero();
        for (int r = 0; r < count; ++r)
          group += load(in + tokens[t + r] * C + j, n);
        sum += group;
      }
      store(row + j, sum, n);
    });
  }
}

} // namespace

extern const EmbeddingKernels embedding_kernels;
const EmbeddingKernels embedding_kernels = {{sum_tokens<float>, sum_tokens<bf16>}};

} // namespace fastformer::cpu::FASTFORMER_ISA
