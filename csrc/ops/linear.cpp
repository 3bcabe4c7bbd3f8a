// Bindings of the ops linear_fwd and linear_bwd.
#include "ops/binding.h"
#include "ops/gemm.h"
#include "ops/memory.h"
#include "ops/rows.h"

#include <tuple>
#include <vector>

namespace fastformer {
namespace {

// The sizes of `x` (..., C) as a matrix: all leading dimensions are rows.
struct Rows {
  explicit Rows(const Tensor &x) : cols(x.size(x.dim() - 1)) {
    for (int64_t d = 0; d + 1 < x.dim(); ++d)
      rows *= x.size(d);
  }
  int64_t rows = 1, cols;
};

Tensor as_matrix(const Tensor &x) {
  const Rows size(x);
  return torch::stable::reshape(x, {size.rows, size.cols});
}

void check(const char *op, const Tensor &x, const Tensor &weight) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": x must be float32 or bfloat16");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, op, ": x and weight must have one dtype");
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1), op,
                  ": x must be (..., C) and weight (C_out, C)");
}

Tensor linear_fwd_cpu(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  check("linear_fwd", x, weight);
  const Rows size(x);
  const int64_t cols = weight.size(0);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = cols;
  const Tensor out = new_tensor(shape, x.scalar_type());
  const Tensor product = torch::stable::view(out, {size.rows, cols});
  if (!bias.has_value()) {
    mm_out(product, as_matrix(x), transposed(weight));
    return out;
  }
  STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 &&
                      bias->size(0) == cols,
                  "linear_fwd: bias must be (C_out,) in the dtype of x");
  mm_bias_out(product, as_matrix(x), transposed(weight),
              float_vector("linear_fwd", "bias", *bias, cols));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd_cpu(const Tensor &grad_out, const Tensor &x,
                                                  const Tensor &weight, ScalarType grad_dtype) {
  check("linear_bwd", x, weight);
  check_grad_dtype("linear_bwd", grad_dtype, x.scalar_type());
  const Rows size(x), grad_size(grad_out);
  STD_TORCH_CHECK(grad_out.scalar_type() == x.scalar_type() && grad_size.rows == size.rows &&
                      grad_size.cols == weight.size(0),
                  "linear_bwd: grad_out must be (..., C_out) in the dtype of x");
  const Tensor grad = torch::stable::contiguous(as_matrix(grad_out));
  const Tensor grad_x = new_tensor(x.sizes(), x.scalar_type());
  const Tensor grad_weight = new_tensor(weight.sizes(), grad_dtype);
  mm_out(torch::stable::view(grad_x, {size.rows, size.cols}), grad, weight);
  mm_out(grad_weight, transposed(grad), as_matrix(x));
  return {grad_x, grad_weight,
          column_sums(grad, size.rows, weight.size(0), is_bf16("linear_bwd", "x", x), grad_dtype)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("linear_fwd.cpu", TORCH_BOX(&linear_fwd_cpu));
  m.impl("linear_bwd.cpu", TORCH_BOX(&linear_bwd_cpu));
}

} // namespace fastformer
