// Matrix products, written into memory we own: by our own kernel where it is the faster one, else
// by PyTorch's libraries (oneDNN, MKL).
//
// Operands are views: a transposed one costs no copy, as all of them read either order. Nothing
// here touches the dispatcher's autograd or autocast keys; ops run below them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastformer {

// A 2-D matrix seen with its dimensions exchanged.
inline torch::stable::Tensor transposed(const torch::stable::Tensor &a) {
  return torch::stable::transpose(a, 0, 1);
}

// out = a b, all of one dtype, float32 or bfloat16; `out` (M, N) is contiguous.
void mm_out(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
            const torch::stable::Tensor &b);

// out = a b + bias, where `bias` (N,) is float32.
void mm_bias_out(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
                 const torch::stable::Tensor &b, const torch::stable::Tensor &bias);

// out += a b in float32.
void mm_add(const torch::stable::Tensor &out, const torch::stable::Tensor &a,
            const torch::stable::Tensor &b);

} // namespace fastformer
