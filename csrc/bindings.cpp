// Registers the C++ implementations of ops whose schemas are defined in Python.
//
// The only source that includes torch headers, and only those of the stable ABI: the library loads
// under every torch from TORCH_TARGET_VERSION on, CPU or CUDA build, and under every Python.
#include "build_info.h"
#include "cpu/kernels.h"
#include "philox.h"
#ifdef FASTFORMER_WITH_CUDA
#include "cuda/launchers.h"
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <string>

#ifdef FASTFORMER_WITH_CUDA
// Only a CUDA build of torch has this symbol: weak, it is null under the others.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void **ret_stream);
#endif

namespace fastformer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const cpu::Kernels *select_cpu_kernels() {
  const char *error = nullptr;
  const cpu::Kernels *kernels = cpu::select_kernels(&error);
  STD_TORCH_CHECK(kernels != nullptr, error);
  return kernels;
}

const cpu::Kernels &cpu_kernels() {
  static const cpu::Kernels *const selected = select_cpu_kernels();
  return *selected;
}

#ifdef FASTFORMER_WITH_CUDA
// Makes the tensor's device current and finds its stream.
class CudaLaunch {
public:
  CudaLaunch(const char *op, const Tensor &on)
      : op_(op), device_(checked_device(op, on)), guard_(device_) {
    void *stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<fastformer_stream>(stream);
  }

  fastformer_stream stream() const { return stream_; }

  void check(int error) const {
    STD_TORCH_CHECK(error == 0, op_, ": CUDA error ", error,
                    " at launch: ", fastformer_cuda_error(error));
  }

private:
  // Comes before the guard, whose own message under a CPU build of torch helps nobody.
  static int32_t checked_device(const char *op, const Tensor &on) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                    ": this PyTorch is a CPU build; install a CUDA build of torch");
    return on.get_device_index();
  }

  const char *op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  fastformer_stream stream_;
};
#endif

uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::min(65535.0, std::nearbyint(p * 65536.0)));
}

void check_mask(int64_t rows, int64_t cols, const Tensor &rng) {
  STD_TORCH_CHECK(rows >= 0 && rows < (int64_t{1} << 32) && cols >= 0,
                  "dropout_mask: rows must be in [0, 2**32) and cols at least 0, got (", rows, ", ",
                  cols, ")");
  STD_TORCH_CHECK(rng.scalar_type() == ScalarType::Long && rng.numel() == 2 && rng.is_contiguous(),
                  "dropout_mask: rng must be a contiguous int64 tensor (seed, offset)");
}

Tensor dropout_mask_cpu(int64_t rows, int64_t cols, double p, const Tensor &rng, int64_t site) {
  check_mask(rows, cols, rng);
  const cpu::Kernels &kernels = cpu_kernels();
  Tensor keep = torch::stable::empty({rows, cols}, ScalarType::Bool);
  const int64_t *state = static_cast<const int64_t *>(rng.const_data_ptr());
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  const uint64_t stream = static_cast<uint64_t>(state[1]) + static_cast<uint64_t>(site);
  const uint32_t threshold = dropout_threshold(p);
  bool *out = static_cast<bool *>(keep.mutable_data_ptr());
  const int64_t draws = rows * ((cols + kColsPerDraw - 1) / kColsPerDraw);
  torch::stable::parallel_for(0, draws, 4096, [&](int64_t begin, int64_t end) {
    kernels.dropout_mask(out, begin, end, cols, seed, stream, threshold);
  });
  return keep;
}

#ifdef FASTFORMER_WITH_CUDA
Tensor dropout_mask_cuda(int64_t rows, int64_t cols, double p, const Tensor &rng, int64_t site) {
  const CudaLaunch launch("dropout_mask", rng);
  check_mask(rows, cols, rng);
  Tensor keep = torch::stable::empty({rows, cols}, ScalarType::Bool, std::nullopt, rng.device());
  launch.check(fastformer_dropout_mask(static_cast<bool *>(keep.mutable_data_ptr()),
                                       static_cast<const int64_t *>(rng.const_data_ptr()), rows,
                                       cols, site, dropout_threshold(p), launch.stream()));
  return keep;
}
#endif

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
}

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("dropout_mask.cpu", TORCH_BOX(&dropout_mask_cpu));
}

#ifdef FASTFORMER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastformer, CUDA, m) {
  m.impl("dropout_mask.cuda", TORCH_BOX(&dropout_mask_cuda));
}
#endif

} // namespace fastformer
