// What the bindings of all ops share, and the op that tells how the library was built. The ops' own
// bindings are in csrc/ops; their schemas are defined in Python.
#include "build_info.h"
#include "ops/binding.h"
#include "ops/memory.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace fastformer {
namespace {

const cpu::Kernels *select_cpu_kernels() {
  const char *error = nullptr;
  const cpu::Kernels *kernels = cpu::select_kernels(&error);
  STD_TORCH_CHECK(kernels != nullptr, error);
  return kernels;
}

} // namespace

const cpu::Kernels &cpu_kernels() {
  static const cpu::Kernels *const selected = select_cpu_kernels();
  return *selected;
}

uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::min(65535.0, std::nearbyint(p * 65536.0)));
}

cpu::Dropout cpu_dropout(const char *op, double p, const std::optional<Tensor> &rng, int64_t site) {
  cpu::Dropout dropout;
  if (!rng.has_value())
    return dropout;
  STD_TORCH_CHECK(rng->scalar_type() == ScalarType::Long && rng->numel() == 2 &&
                      rng->is_contiguous(),
                  op, ": rng must be a contiguous int64 tensor (seed, offset)");
  const int64_t *state = static_cast<const int64_t *>(rng->const_data_ptr());
  dropout.seed = static_cast<uint64_t>(state[0]);
  dropout.stream = static_cast<uint64_t>(state[1]) + static_cast<uint64_t>(site);
  dropout.threshold = dropout_threshold(p);
  dropout.scale = 65536.0f / static_cast<float>(65536 - dropout.threshold);
  return dropout;
}

namespace {

// "key=value" lines. Never raises, so that a wrong FASTFORMER_CPU_ISA does not forbid the import.
std::string build_info() {
  const char *error = nullptr;
  const cpu::Kernels *kernels = cpu::select_kernels(&error);
  std::string info = kBuildFacts;
  info += std::string("\ncpu_isa=") + (kernels ? kernels->isa : "none (FASTFORMER_CPU_ISA)");
#ifdef FASTFORMER_WITH_CUDA
  const int version = fastformer_cuda_runtime_version();
  info += "\ncuda_runtime=" + std::to_string(version / 1000) + "." +
          std::to_string(version % 1000 / 10);
  info += std::string("\ntorch=") + (aoti_torch_get_current_cuda_stream ? "cuda" : "cpu");
#else
  info += "\ncuda_runtime=none";
#endif
  return info;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("release_memory", TORCH_BOX(&release_memory));
}

} // namespace fastformer
