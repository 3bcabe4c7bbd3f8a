// Bindings of layer_norm_fwd, layer_norm_bwd, add_layer_norm_fwd and add_layer_norm_bwd.
#include "ops/binding.h"
#include "ops/memory.h"
#include "ops/rows.h"

#include <tuple>

namespace fastformer {
namespace {

void check_same_shape(const char *op, const char *name, const Tensor &t, const Tensor &like) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i)
    same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape of the rows that are normalised");
}

Tensor statistics(int64_t rows) { return new_tensor({rows}, ScalarType::Float); }

using Forward = void (*)(const cpu::LayerNormForward &, int64_t, int64_t);

// What both forward ops share; `a` has the tensors that are not named here. Returns the normalised
// rows, mean and rstd.
std::tuple<Tensor, Tensor, Tensor> normalise(const char *op, Forward kernel,
                                             cpu::LayerNormForward &a, const Tensor &rows,
                                             const Tensor &weight,
                                             const std::optional<Tensor> &bias, double eps,
                                             ScalarType out_dtype) {
  const RowShape shape(op, rows);
  const Tensor weights = float_vector(op, "weight", weight, shape.C);
  std::optional<Tensor> shifts;
  if (bias)
    shifts = float_vector(op, "bias", *bias, shape.C);
  Tensor normed = new_tensor(rows.sizes(), out_dtype);
  Tensor mean = statistics(shape.N), rstd = statistics(shape.N);
  a.weight = floats(weights);
  a.bias = shifts ? floats(*shifts) : nullptr;
  a.normed = normed.mutable_data_ptr();
  a.mean = static_cast<float *>(mean.mutable_data_ptr());
  a.rstd = static_cast<float *>(rstd.mutable_data_ptr());
  a.C = shape.C;
  a.eps = static_cast<float>(eps);
  torch::stable::parallel_for(0, shape.N, row_grain(shape.C),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {normed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor &x, const Tensor &weight,
                                                  const std::optional<Tensor> &bias, double eps,
                                                  ScalarType out_dtype) {
  const char *op = "layer_norm_fwd";
  const Tensor rows = torch::stable::contiguous(x);
  cpu::LayerNormForward a{};
  a.residual = rows.const_data_ptr();
  const Forward kernel =
      cpu_kernels().layer_norm->fwd[is_bf16(op, "x", x)][is_bf16(op, "out_dtype", out_dtype)];
  return normalise(op, kernel, a, rows, weight, bias, eps, out_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
add_layer_norm_fwd(const Tensor &x, const Tensor &residual, const Tensor &weight,
                   const std::optional<Tensor> &bias, double eps, ScalarType out_dtype,
                   double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "add_layer_norm_fwd";
  check_same_shape(op, "x", x, residual);
  const Tensor branch = torch::stable::contiguous(x), stream = torch::stable::contiguous(residual);
  Tensor new_residual = new_tensor(stream.sizes(), stream.scalar_type());
  cpu::LayerNormForward a{};
  a.x = branch.const_data_ptr();
  a.residual = stream.const_data_ptr();
  a.new_residual = new_residual.mutable_data_ptr();
  a.dropout = cpu_dropout(op, dropout_p, rng, site);
  const Forward kernel =
      cpu_kernels().layer_norm->add_fwd[is_bf16(op, "x", x)][is_bf16(op, "residual", residual)]
                                       [is_bf16(op, "out_dtype", out_dtype)];
  auto [normed, mean, rstd] = normalise(op, kernel, a, stream, weight, bias, eps, out_dtype);
  return {normed, new_residual, mean, rstd};
}

using Backward = void (*)(const cpu::LayerNormBackward &, int64_t, int64_t);

// What both backward ops share; `a` has the tensors that are not named here. Returns the gradients
// of the rows, weight and bias.
std::tuple<Tensor, Tensor, Tensor>
differentiate(const char *op, Backward kernel, cpu::LayerNormBackward &a, const Tensor &grad_normed,
              const Tensor &rows, const Tensor &weight, const Tensor &mean, const Tensor &rstd) {
  const RowShape shape(op, rows);
  check_same_shape(op, "the gradient", grad_normed, rows);
  const Tensor grads = torch::stable::contiguous(grad_normed),
               saved = torch::stable::contiguous(rows);
  const Tensor weights = float_vector(op, "weight", weight, shape.C);
  const Tensor means = float_vector(op, "mean", mean, shape.N);
  const Tensor rstds = float_vector(op, "rstd", rstd, shape.N);
  const RowBlocks blocks(shape.N);
  Tensor grad_rows = new_tensor(rows.sizes(), rows.scalar_type());
  Tensor partials = new_tensor({blocks.count, 2, shape.C}, ScalarType::Float);
  a.grad_normed = grads.const_data_ptr();
  a.rows = saved.const_data_ptr();
  a.weight = floats(weights);
  a.mean = floats(means);
  a.rstd = floats(rstds);
  a.grad_rows = grad_rows.mutable_data_ptr();
  a.partials = static_cast<float *>(partials.mutable_data_ptr());
  a.N = shape.N;
  a.C = shape.C;
  a.rows_per_block = blocks.rows_per_block;
  torch::stable::parallel_for(0, blocks.count, blocks.grain(shape.C),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  Tensor grad_weight = new_tensor(weight.sizes(), weight.scalar_type());
  Tensor grad_bias = new_tensor(weight.sizes(), weight.scalar_type());
  const auto add_blocks = cpu_kernels().linear->add_blocks[is_bf16(op, "weight", weight)];
  const int64_t stride = 2 * shape.C;
  add_blocks(grad_weight.mutable_data_ptr(), a.partials, blocks.count, stride, shape.C);
  add_blocks(grad_bias.mutable_data_ptr(), a.partials + shape.C, blocks.count, stride, shape.C);
  return {grad_rows, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor &grad_out, const Tensor &x,
                                                  const Tensor &weight, const Tensor &mean,
                                                  const Tensor &rstd) {
  const char *op = "layer_norm_bwd";
  cpu::LayerNormBackward a{};
  const Backward kernel =
      cpu_kernels().layer_norm->bwd[is_bf16(op, "x", x)][is_bf16(op, "grad_out", grad_out)];
  return differentiate(op, kernel, a, grad_out, x, weight, mean, rstd);
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
add_layer_norm_bwd(const Tensor &grad_normed, const std::optional<Tensor> &grad_new_residual,
                   const Tensor &new_residual, const Tensor &weight, const Tensor &mean,
                   const Tensor &rstd, ScalarType x_dtype, double dropout_p,
                   const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "add_layer_norm_bwd";
  cpu::LayerNormBackward a{};
  std::optional<Tensor> passed;
  if (grad_new_residual) {
    check_same_shape(op, "grad_new_residual", *grad_new_residual, new_residual);
    (void)is_bf16(op, "grad_new_residual", *grad_new_residual);
    passed = torch::stable::contiguous(
        torch::stable::to(*grad_new_residual, new_residual.scalar_type()));
    a.grad_new_residual = passed->const_data_ptr();
  }
  Tensor grad_x = new_tensor(new_residual.sizes(), x_dtype);
  a.grad_x = grad_x.mutable_data_ptr();
  a.dropout = cpu_dropout(op, dropout_p, rng, site);
  const int x_type = is_bf16(op, "x_dtype", x_dtype);
  const int stream_type = is_bf16(op, "new_residual", new_residual);
  const Backward kernel =
      cpu_kernels()
          .layer_norm->add_bwd[x_type][stream_type][is_bf16(op, "grad_normed", grad_normed)];
  auto [grad_residual, grad_weight, grad_bias] =
      differentiate(op, kernel, a, grad_normed, new_residual, weight, mean, rstd);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("layer_norm_fwd.cpu", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd.cpu", TORCH_BOX(&layer_norm_bwd));
  m.impl("add_layer_norm_fwd.cpu", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd.cpu", TORCH_BOX(&add_layer_norm_bwd));
}

} // namespace fastformer
