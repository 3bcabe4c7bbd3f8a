// Binding of the op dropout_mask.
#include "ops/binding.h"
#include "philox.h"

namespace fastformer {
namespace {

void check_mask(int64_t rows, int64_t cols, const Tensor &rng) {
  STD_TORCH_CHECK(rows >= 0 && rows < (int64_t{1} << 32) && cols >= 0,
                  "dropout_mask: rows must be in [0, 2**32) and cols at least 0, got (", rows, ", ",
                  cols, ")");
  STD_TORCH_CHECK(rng.scalar_type() == ScalarType::Long && rng.numel() == 2 && rng.is_contiguous(),
                  "dropout_mask: rng must be a contiguous int64 tensor (seed, offset)");
}

Tensor dropout_mask_cpu(int64_t rows, int64_t cols, double p, const Tensor &rng, int64_t site) {
  check_mask(rows, cols, rng);
  Tensor keep = torch::stable::empty({rows, cols}, ScalarType::Bool);
  const cpu::Dropout dropout = cpu_dropout("dropout_mask", p, rng, site);
  const auto kernel = cpu_kernels().dropout->mask;
  bool *out = static_cast<bool *>(keep.mutable_data_ptr());
  const int64_t draws = rows * ((cols + kColsPerDraw - 1) / kColsPerDraw);
  torch::stable::parallel_for(
      0, draws, 4096, [&](int64_t begin, int64_t end) { kernel(out, begin, end, cols, dropout); });
  return keep;
}

#ifdef FASTFORMER_WITH_CUDA
Tensor dropout_mask_cuda(int64_t rows, int64_t cols, double p, const Tensor &rng, int64_t site) {
  const CudaLaunch launch("dropout_mask", rng);
  check_mask(rows, cols, rng);
  Tensor keep = torch::stable::empty({rows, cols}, ScalarType::Bool, std::nullopt, rng.device());
  launch.check(fastformer_dropout_mask(static_cast<bool *>(keep.mutable_data_ptr()),
                                       static_cast<const int64_t *>(rng.const_data_ptr()), rows,
                                       cols, site, dropout_threshold(p), launch.stream()),
               keep);
  return keep;
}
#endif

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("dropout_mask.cpu", TORCH_BOX(&dropout_mask_cpu));
}

#ifdef FASTFORMER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastformer, CUDA, m) {
  m.impl("dropout_mask.cuda", TORCH_BOX(&dropout_mask_cuda));
}
#endif

} // namespace fastformer
