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
    for_each_vec(0, C, [&](int64_t j, auto n, int) {
      const auto term = [&](int64_t t) { return load(in + tokens[t] * C + j, n); };
      store(row + j, sum_in_groups(starts[v], starts[v + 1], term), n);
    });
  }
}

} // namespace

extern const EmbeddingKernels embedding_kernels;
const EmbeddingKernels embedding_kernels = {{sum_tokens<float>, sum_tokens<bf16>}};

} // namespace fastformer::cpu::FASTFORMER_ISA
