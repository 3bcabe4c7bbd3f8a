// Bindings of mlp_fwd and mlp_bwd: the matrix products of PyTorch, and one pass of our own over
// memory between two of them.
#include "ops/binding.h"
#include "ops/gemm.h"
#include "ops/memory.h"
#include "ops/rows.h"

#include <tuple>
#include <vector>

namespace fastformer {
namespace {

// The sizes of x (N, C), w1 (F, C) and w2 (C_out, F), checked against each other.
struct Sizes : RowShape {
  Sizes(const char *op, const Tensor &x, const Tensor &w1, const Tensor &w2) : RowShape(op, x) {
    STD_TORCH_CHECK(w1.dim() == 2 && w2.dim() == 2 && C == w1.size(1) && w1.size(0) == w2.size(1),
                    op, ": x must be (..., C), w1 (F, C) and w2 (C_out, F)");
    STD_TORCH_CHECK(x.scalar_type() == w1.scalar_type() && x.scalar_type() == w2.scalar_type(), op,
                    ": dtypes must match, got x ", x.scalar_type(), ", w1 ", w1.scalar_type(),
                    ", w2 ", w2.scalar_type());
    type = is_bf16(op, "x", x);
    F = w1.size(0);
    C_out = w2.size(0);
  }

  int type;
  int64_t F, C_out;
};

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor &x, const Tensor &w1,
                                   const std::optional<Tensor> &b1, const Tensor &w2,
                                   const std::optional<Tensor> &b2, bool tanh, double dropout_p,
                                   const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "mlp_fwd";
  const Sizes s(op, x, w1, w2);
  const cpu::MlpKernels &kernels = *cpu_kernels().mlp;
  std::optional<Tensor> bias1, bias2;
  if (b1)
    bias1 = float_vector(op, "b1", *b1, s.F);
  if (b2)
    bias2 = float_vector(op, "b2", *b2, s.C_out);

  // The first bias is added in the pass of GELU, which costs nothing.
  Tensor pre = new_tensor({s.N, s.F}, x.scalar_type());
  mm_out(pre, torch::stable::reshape(x, {s.N, s.C}), transposed(w1));
  Tensor hidden = new_tensor({s.N, s.F}, x.scalar_type());
  cpu::GeluForward a{};
  a.pre = pre.mutable_data_ptr();
  a.bias = bias1 ? floats(*bias1) : nullptr;
  a.hidden = hidden.mutable_data_ptr();
  a.F = s.F;
  a.dropout = cpu_dropout(op, dropout_p, rng, site);
  const auto gelu = kernels.gelu_fwd[s.type][tanh];
  torch::stable::parallel_for(0, s.N, row_grain(s.F),
                              [&](int64_t begin, int64_t end) { gelu(a, begin, end); });

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = s.C_out;
  Tensor out = new_tensor(shape, x.scalar_type());
  const Tensor product = torch::stable::view(out, {s.N, s.C_out});
  if (bias2)
    mm_bias_out(product, hidden, transposed(w2), *bias2);
  else
    mm_out(product, hidden, transposed(w2));
  return {out, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
mlp_bwd(const Tensor &grad_out, const Tensor &x, const Tensor &w1, const Tensor &w2,
        const Tensor &pre, bool tanh, double dropout_p, const std::optional<Tensor> &rng,
        int64_t site) {
  const char *op = "mlp_bwd";
  const Sizes s(op, x, w1, w2);
  STD_TORCH_CHECK(grad_out.numel() == s.N * s.C_out && pre.numel() == s.N * s.F &&
                      grad_out.scalar_type() == x.scalar_type() &&
                      pre.scalar_type() == x.scalar_type(),
                  op, ": grad_out (..., C_out) and pre (N, F) must fit x and the weights");
  const cpu::MlpKernels &kernels = *cpu_kernels().mlp;
  const Tensor grad_rows =
      torch::stable::contiguous(torch::stable::reshape(grad_out, {s.N, s.C_out}));
  const Tensor saved = torch::stable::contiguous(pre);

  Tensor grad_pre = new_tensor({s.N, s.F}, x.scalar_type()); // first the gradient of hidden
  mm_out(grad_pre, grad_rows, w2);
  Tensor hidden = new_tensor({s.N, s.F}, x.scalar_type());
  const RowBlocks blocks(s.N);
  Tensor partials = new_tensor({blocks.count, 2, s.F}, ScalarType::Float);
  cpu::GeluBackward a{};
  a.pre = saved.const_data_ptr();
  a.grad = grad_pre.mutable_data_ptr();
  a.hidden = hidden.mutable_data_ptr();
  a.partials = static_cast<float *>(partials.mutable_data_ptr());
  a.N = s.N;
  a.F = s.F;
  a.rows_per_block = blocks.rows_per_block;
  a.dropout = cpu_dropout(op, dropout_p, rng, site);
  const auto gelu = kernels.gelu_bwd[s.type][tanh];
  torch::stable::parallel_for(0, blocks.count, blocks.grain(s.F),
                              [&](int64_t begin, int64_t end) { gelu(a, begin, end); });
  Tensor grad_b1 = new_tensor({s.F}, x.scalar_type());
  cpu_kernels().linear->add_blocks[s.type](grad_b1.mutable_data_ptr(), a.partials, blocks.count,
                                           2 * s.F, s.F);

  Tensor grad_w1 = new_tensor({s.F, s.C}, x.scalar_type());
  mm_out(grad_w1, transposed(grad_pre), torch::stable::reshape(x, {s.N, s.C}));
  Tensor grad_w2 = new_tensor({s.C_out, s.F}, x.scalar_type());
  mm_out(grad_w2, transposed(grad_rows), hidden);
  Tensor grad_x = new_tensor(x.sizes(), x.scalar_type());
  mm_out(torch::stable::view(grad_x, {s.N, s.C}), grad_pre, w1);
  return {grad_x, grad_w1, grad_b1, grad_w2, column_sums(grad_rows, s.N, s.C_out, s.type)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("mlp_fwd.cpu", TORCH_BOX(&mlp_fwd));
  m.impl("mlp_bwd.cpu", TORCH_BOX(&mlp_bwd));
}

} // namespace fastformer
