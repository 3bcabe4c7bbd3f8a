// Matrix products by PyTorch's own libraries (oneDNN, MKL), written into memory we own.
//
// Operands are views: a transposed one costs no copy, as both libraries read either order. Nothing
// here touches the dispatcher's autograd or autocast keys; ops run below them.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace fastformer {

// A 2-D matrix seen with its dimensions exchanged.
inline torch::stable::Tensor transposed(const torch::stable::Tensor &a) {
  return torch::stable::transpose(a, 0, 1);
}

// out = a b. All of one dtype; `out` has the shape of the product.
inline void mm_out(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
                   const torch::stable::Tensor &b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// out = added + a b, where `added` broadcasts to the product's shape and may be `out` itself.
inline void addmm_out(const torch::stable::Tensor &out, const torch::stable::Tensor &added,
                      const torch::stable::Tensor &a, const torch::stable::Tensor &b) {
  // Not through the dispatcher, whose stable interface has no word for a Scalar.
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
}

} // namespace fastformer
