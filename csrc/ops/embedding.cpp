// Binding of the op embedding_bwd.
#include "ops/binding.h"
#include "ops/memory.h"
#include "ops/rows.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fastformer {
namespace {

// Dense int64. Raises ValueError for an id out of range (which std::invalid_argument becomes).
Tensor checked_ids(const Tensor &ids, int64_t vocabulary) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
                  "embedding_bwd: ids must be int64 or int32, got ", ids.scalar_type());
  const Tensor dense = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
  const int64_t *id = static_cast<const int64_t *>(dense.const_data_ptr());
  for (int64_t i = 0; i < dense.numel(); ++i)
    if (id[i] < 0 || id[i] >= vocabulary)
      throw std::invalid_argument("embedding_bwd: ids must be in [0, " +
                                  std::to_string(vocabulary) + "), got " + std::to_string(id[i]));
  return dense;
}

// Sorts tokens by id: those of id v become tokens[starts[v], starts[v + 1]), in order.
void sort_tokens(const int64_t *id, int64_t N, int64_t vocabulary, int32_t *tokens,
                 int32_t *starts) {
  // One place further on while they are counted and placed, which moves each back to its own.
  std::fill(starts, starts + vocabulary + 2, 0);
  for (int64_t i = 0; i < N; ++i)
    ++starts[id[i] + 2];
  std::partial_sum(starts, starts + vocabulary + 2, starts);
  for (int64_t i = 0; i < N; ++i)
    tokens[starts[id[i] + 1]++] = static_cast<int32_t>(i);
}

Tensor embedding_bwd_cpu(const Tensor &grad_out, const Tensor &ids, int64_t vocabulary) {
  const char *op = "embedding_bwd";
  const int type = is_bf16(op, "grad_out", grad_out);
  const RowShape shape(op, grad_out);
  const int64_t N = shape.N, C = shape.C, most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(ids.numel() == N && ids.dim() + 1 == grad_out.dim(), op,
                  ": grad_out must have the shape of ids and one dimension more");
  STD_TORCH_CHECK(vocabulary >= 0 && vocabulary < most && N < most, op,
                  ": ids and rows of weight must be fewer than 2**31, got ", N, " and ",
                  vocabulary);
  const Tensor dense = checked_ids(ids, vocabulary);
  const Tensor grad = torch::stable::contiguous(grad_out);
  const Tensor index = new_tensor({N + vocabulary + 2}, ScalarType::Int);
  int32_t *tokens = static_cast<int32_t *>(index.mutable_data_ptr()), *starts = tokens + N;
  sort_tokens(static_cast<const int64_t *>(dense.const_data_ptr()), N, vocabulary, tokens, starts);

  const Tensor out = new_tensor({vocabulary, C}, grad_out.scalar_type());
  // A row is as much work as a token. Threads share both: row v comes after v rows and the
  // starts[v] tokens of these.
  const auto row_at = [&](int64_t work) {
    int64_t low = 0, high = vocabulary;
    while (low < high) {
      const int64_t v = (low + high) / 2;
      if (v + starts[v] < work)
        low = v + 1;
      else
        high = v;
    }
    return low;
  };
  const auto kernel = cpu_kernels().embedding->sum_tokens[type];
  torch::stable::parallel_for(0, vocabulary + N, row_grain(C), [&](int64_t begin, int64_t end) {
    kernel(out.mutable_data_ptr(), grad.const_data_ptr(), tokens, starts, row_at(begin),
           row_at(end), C);
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("embedding_bwd.cpu", TORCH_BOX(&embedding_bwd_cpu));
}

} // namespace fastformer
