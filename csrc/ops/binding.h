// What the bindings of all ops share: the table of CPU kernels, the guard around CUDA launches, and
// the reading of a dropout state.
//
// Only csrc/ops and csrc/bindings.cpp include torch headers, and only those of the stable ABI: the
// library loads under every torch from TORCH_TARGET_VERSION on, CPU or CUDA build.
#pragma once
#include "cpu/kernels.h"
#ifdef FASTFORMER_WITH_CUDA
#include "cuda/launchers.h"
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#ifdef FASTFORMER_WITH_CUDA
// Only a CUDA build of torch has this symbol: weak, it is null under the others.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void **ret_stream);
#endif

namespace fastformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels for this machine; raises if FASTFORMER_CPU_ISA names none that it can run.
const cpu::Kernels &cpu_kernels();

uint32_t dropout_threshold(double p);

// Reads a state on the CPU; without one nothing is dropped.
cpu::Dropout cpu_dropout(const char *op, double p, const std::optional<Tensor> &rng, int64_t site);

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

  // The message tells the shapes of the tensors.
  template <typename... Tensors> void check(int error, const Tensors &...on) const {
    STD_TORCH_CHECK(error == 0, op_, ": CUDA error ", error, " at launch, on", shapes({&on...}),
                    ": ", fastformer_cuda_error(error));
  }

private:
  static std::string shapes(std::initializer_list<const Tensor *> tensors) {
    std::string text;
    for (const Tensor *t : tensors) {
      text += text.empty() ? " (" : ", (";
      for (int64_t i = 0; i < t->dim(); ++i)
        text += (i ? ", " : "") + std::to_string(t->size(i));
      text += ")";
    }
    return text;
  }

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

// The launchers' name of a dtype.
inline int dtype_index(const char *op, const char *name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  op, ": ", name, " must be float32, bfloat16 or float16, got ", type);
  return type == ScalarType::Float      ? FASTFORMER_FLOAT32
         : type == ScalarType::BFloat16 ? FASTFORMER_BFLOAT16
                                        : FASTFORMER_FLOAT16;
}

// An uninitialised contiguous tensor on the device of `t`.
inline Tensor like(const Tensor &t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                   ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, t.device());
}

// Fills in what a launcher's arguments have of dropout; without a state nothing is dropped.
template <typename Args>
void set_dropout(const char *op, Args &a, double p, const std::optional<Tensor> &rng,
                 int64_t site) {
  if (!rng)
    return;
  STD_TORCH_CHECK(rng->scalar_type() == ScalarType::Long && rng->numel() == 2 &&
                      rng->is_contiguous(),
                  op, ": rng must be a contiguous int64 tensor (seed, offset)");
  a.rng = static_cast<const int64_t *>(rng->const_data_ptr());
  a.site = site;
  a.threshold = dropout_threshold(p);
  a.scale = 65536.0f / static_cast<float>(65536 - a.threshold);
}
#endif

} // namespace fastformer
