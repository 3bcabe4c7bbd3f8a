// Matrix products, written into memory we own: by our own kernel where it is the faster one, else
// by PyTorch's libraries (oneDNN, MKL).
//
// Operands are views: a transposed one costs no copy, as all of them read either order. Nothing
// here touches the dispatcher's autograd or autocast keys; ops run below them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastformer {

// A 2-D matrix seen with its dimensions exchanged.
inline torch::stable::Tensor transposed(const torch::stable::Tensor &a) {
  return torch::stable::transpose(a, 0, 1);
}

// out = a b, where a and b are of one dtype, float32 or bfloat16, and the contiguous `out` (M, N)
// is of that dtype or float32.
void mm_out(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
            const torch::stable::Tensor &b);

// out = a b + bias, all of one dtype but `bias` (N,), which is float32.
void mm_bias_out(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
                 const torch::stable::Tensor &b, const torch::stable::Tensor &bias);

// out += a b, where `out` is float32.
void mm_add(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
            const torch::stable::Tensor &b);

// By PyTorch's libraries alone, on any device and in any dtype: out = a b, and out = x weight^T +
// bias, where cuBLAS adds the bias before it rounds.
void library_mm(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
                const torch::stable::Tensor &b);
void library_linear(const torch::stable::Tensor &out, const torch::stable::Tensor &x,
                    const torch::stable::Tensor &weight,
                    const std::optional<torch::stable::Tensor> &bias);

} // namespace fastformer
