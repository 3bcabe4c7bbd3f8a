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

#ifdef FASTFORMER_WITH_CUDA
void check_cuda_rows(const char *op, const RowShape &shape, ScalarType x, ScalarType residual,
                     ScalarType normed) {
  STD_TORCH_CHECK(fastformer_layer_norm_takes(dtype_index(op, "x", x),
                                              dtype_index(op, "the residual", residual),
                                              dtype_index(op, "the result", normed)),
                  op, ": there is no kernel for x in ", x, ", the residual in ", residual,
                  " and the result in ", normed,
                  "; the result has the dtype of x or is 16 bits beside float32, and the residual"
                  " has that of x or is float32");
  STD_TORCH_CHECK(shape.C <= fastformer_layer_norm_max_cols(), op, ": C must be at most ",
                  fastformer_layer_norm_max_cols(), ", got ", shape.C);
  STD_TORCH_CHECK(shape.N < (int64_t{1} << 31), op, ": there must be less than 2**31 rows, got ",
                  shape.N);
}

Tensor float_vector_cuda(const char *op, const char *name, const Tensor &t, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, op, ": ", name, " must have shape (", size,
                  ",), got ", t.numel(), " elements in ", t.dim(), " dimensions");
  const bool is_float = dtype_index(op, name, t.scalar_type()) == FASTFORMER_FLOAT32;
  return torch::stable::contiguous(is_float ? t : torch::stable::to(t, ScalarType::Float));
}

// What both forward ops share, as `normalise` does for the CPU.
std::tuple<Tensor, Tensor, Tensor> normalise_cuda(const char *op, fastformer_layer_norm_fwd_args &a,
                                                  ScalarType x_dtype, const Tensor &rows,
                                                  const Tensor &weight,
                                                  const std::optional<Tensor> &bias, double eps,
                                                  ScalarType out_dtype) {
  const CudaLaunch launch(op, rows);
  const RowShape shape(op, rows);
  check_cuda_rows(op, shape, x_dtype, rows.scalar_type(), out_dtype);
  const Tensor weights = float_vector_cuda(op, "weight", weight, shape.C);
  std::optional<Tensor> shifts;
  if (bias)
    shifts = float_vector_cuda(op, "bias", *bias, shape.C);
  Tensor normed = like(rows, rows.sizes(), out_dtype);
  Tensor mean = torch::stable::empty({shape.N}, ScalarType::Float, std::nullopt, rows.device());
  Tensor rstd = torch::stable::empty({shape.N}, ScalarType::Float, std::nullopt, rows.device());
  a.weight = floats(weights);
  a.bias = shifts ? floats(*shifts) : nullptr;
  a.normed = normed.mutable_data_ptr();
  a.mean = static_cast<float *>(mean.mutable_data_ptr());
  a.rstd = static_cast<float *>(rstd.mutable_data_ptr());
  a.N = shape.N;
  a.C = shape.C;
  a.eps = static_cast<float>(eps);
  a.x_type = dtype_index(op, "x", x_dtype);
  a.residual_type = dtype_index(op, "the residual", rows.scalar_type());
  a.normed_type = dtype_index(op, "out_dtype", out_dtype);
  launch.check(fastformer_layer_norm_fwd(&a, launch.stream()), rows);
  return {normed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd_cuda(const Tensor &x, const Tensor &weight,
                                                       const std::optional<Tensor> &bias,
                                                       double eps, ScalarType out_dtype) {
  const Tensor rows = torch::stable::contiguous(x);
  fastformer_layer_norm_fwd_args a{};
  a.residual = rows.const_data_ptr();
  return normalise_cuda("layer_norm_fwd", a, x.scalar_type(), rows, weight, bias, eps, out_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
add_layer_norm_fwd_cuda(const Tensor &x, const Tensor &residual, const Tensor &weight,
                        const std::optional<Tensor> &bias, double eps, ScalarType out_dtype,
                        double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "add_layer_norm_fwd";
  check_same_shape(op, "x", x, residual);
  const Tensor branch = torch::stable::contiguous(x), stream = torch::stable::contiguous(residual);
  Tensor new_residual = like(stream, stream.sizes(), stream.scalar_type());
  fastformer_layer_norm_fwd_args a{};
  a.x = branch.const_data_ptr();
  a.residual = stream.const_data_ptr();
  a.new_residual = new_residual.mutable_data_ptr();
  set_dropout(op, a, dropout_p, rng, site);
  auto [normed, mean, rstd] =
      normalise_cuda(op, a, x.scalar_type(), stream, weight, bias, eps, out_dtype);
  return {normed, new_residual, mean, rstd};
}

// What both backward ops share, as `differentiate` does for the CPU.
std::tuple<Tensor, Tensor, Tensor> differentiate_cuda(const char *op,
                                                      fastformer_layer_norm_bwd_args &a,
                                                      ScalarType x_dtype, const Tensor &grad_normed,
                                                      const Tensor &rows, const Tensor &weight,
                                                      const Tensor &mean, const Tensor &rstd) {
  const CudaLaunch launch(op, rows);
  const RowShape shape(op, rows);
  check_same_shape(op, "the gradient", grad_normed, rows);
  check_cuda_rows(op, shape, x_dtype, rows.scalar_type(), grad_normed.scalar_type());
  const Tensor grads = torch::stable::contiguous(grad_normed),
               saved = torch::stable::contiguous(rows);
  const Tensor weights = float_vector_cuda(op, "weight", weight, shape.C);
  const Tensor means = float_vector_cuda(op, "mean", mean, shape.N);
  const Tensor rstds = float_vector_cuda(op, "rstd", rstd, shape.N);
  Tensor grad_rows = like(rows, rows.sizes(), rows.scalar_type());
  Tensor grad_weight = like(weight, weight.sizes(), weight.scalar_type());
  Tensor grad_bias = like(weight, weight.sizes(), weight.scalar_type());
  Tensor sums = torch::stable::empty({fastformer_layer_norm_scratch(shape.N, shape.C)},
                                     ScalarType::Float, std::nullopt, rows.device());
  a.grad_normed = grads.const_data_ptr();
  a.rows = saved.const_data_ptr();
  a.weight = floats(weights);
  a.mean = floats(means);
  a.rstd = floats(rstds);
  a.grad_rows = grad_rows.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  a.sums = static_cast<float *>(sums.mutable_data_ptr());
  a.N = shape.N;
  a.C = shape.C;
  a.x_type = dtype_index(op, "x", x_dtype);
  a.residual_type = dtype_index(op, "the residual", rows.scalar_type());
  a.normed_type = dtype_index(op, "the gradient", grad_normed.scalar_type());
  a.weight_type = dtype_index(op, "weight", weight.scalar_type());
  launch.check(fastformer_layer_norm_bwd(&a, launch.stream()), rows);
  return {grad_rows, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd_cuda(const Tensor &grad_out, const Tensor &x,
                                                       const Tensor &weight, const Tensor &mean,
                                                       const Tensor &rstd) {
  fastformer_layer_norm_bwd_args a{};
  return differentiate_cuda("layer_norm_bwd", a, x.scalar_type(), grad_out, x, weight, mean, rstd);
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
add_layer_norm_bwd_cuda(const Tensor &grad_normed, const std::optional<Tensor> &grad_new_residual,
                        const Tensor &new_residual, const Tensor &weight, const Tensor &mean,
                        const Tensor &rstd, ScalarType x_dtype, double dropout_p,
                        const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "add_layer_norm_bwd";
  const ScalarType dtype = new_residual.scalar_type();
  fastformer_layer_norm_bwd_args a{};
  std::optional<Tensor> passed;
  if (grad_new_residual) {
    check_same_shape(op, "grad_new_residual", *grad_new_residual, new_residual);
    passed = torch::stable::contiguous(torch::stable::to(*grad_new_residual, dtype));
    a.grad_new_residual = passed->const_data_ptr();
  }
  // A loss of the sum alone gives zeros of its dtype: there is no kernel that reads them beside x.
  const bool takes = fastformer_layer_norm_takes(
      dtype_index(op, "x_dtype", x_dtype), dtype_index(op, "new_residual", dtype),
      dtype_index(op, "grad_normed", grad_normed.scalar_type()));
  const Tensor grad = takes ? grad_normed : torch::stable::to(grad_normed, x_dtype);
  Tensor grad_x = like(new_residual, new_residual.sizes(), x_dtype);
  a.grad_x = grad_x.mutable_data_ptr();
  set_dropout(op, a, dropout_p, rng, site);
  auto [grad_residual, grad_weight, grad_bias] =
      differentiate_cuda(op, a, x_dtype, grad, new_residual, weight, mean, rstd);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}
#endif

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("layer_norm_fwd.cpu", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd.cpu", TORCH_BOX(&layer_norm_bwd));
  m.impl("add_layer_norm_fwd.cpu", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd.cpu", TORCH_BOX(&add_layer_norm_bwd));
}

#ifdef FASTFORMER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastformer, CUDA, m) {
  m.impl("layer_norm_fwd.cuda", TORCH_BOX(&layer_norm_fwd_cuda));
  m.impl("layer_norm_bwd.cuda", TORCH_BOX(&layer_norm_bwd_cuda));
  m.impl("add_layer_norm_fwd.cuda", TORCH_BOX(&add_layer_norm_fwd_cuda));
  m.impl("add_layer_norm_bwd.cuda", TORCH_BOX(&add_layer_norm_bwd_cuda));
}
#endif

} // namespace fastformer
