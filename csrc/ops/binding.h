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
#include <optional>

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

} // namespace fastformer
