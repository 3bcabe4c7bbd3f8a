// Bindings of mlp_fwd and mlp_bwd: the matrix products of PyTorch, and one pass of our own over
// memory between two of them. On a GPU cuBLASLt can make that pass the end of a product.
#include "ops/binding.h"
#include "ops/gemm.h"
#include "ops/memory.h"
#include "ops/rows.h"
#ifdef FASTFORMER_WITH_CUDA
#include "cuda/mlp_products.h"

#include <cstdlib>
#include <cstring>
#include <string>
#endif

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
    F = w1.size(0);
    C_out = w2.size(0);
  }

  int64_t F, C_out;
};

void check_gradient(const char *op, const Sizes &s, const Tensor &grad_out, const Tensor &x,
                    const Tensor &pre) {
  STD_TORCH_CHECK(grad_out.numel() == s.N * s.C_out && pre.numel() == s.N * s.F &&
                      grad_out.scalar_type() == x.scalar_type() &&
                      pre.scalar_type() == x.scalar_type(),
                  op, ": grad_out (..., C_out) and pre (N, F) must fit x and the weights");
}

// The shape of the result for x: its own with the last dimension exchanged.
std::vector<int64_t> out_shape(const Sizes &s, const Tensor &x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = s.C_out;
  return shape;
}

std::tuple<Tensor, Tensor> mlp_fwd(const Tensor &x, const Tensor &w1,
                                   const std::optional<Tensor> &b1, const Tensor &w2,
                                   const std::optional<Tensor> &b2, bool tanh, double dropout_p,
                                   const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "mlp_fwd";
  const Sizes s(op, x, w1, w2);
  const int type = is_bf16(op, "x", x);
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
  const auto gelu = kernels.gelu_fwd[type][tanh];
  torch::stable::parallel_for(0, s.N, row_grain(s.F),
                              [&](int64_t begin, int64_t end) { gelu(a, begin, end); });

  Tensor out = new_tensor(out_shape(s, x), x.scalar_type());
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
        int64_t site, ScalarType grad_dtype) {
  const char *op = "mlp_bwd";
  const Sizes s(op, x, w1, w2);
  check_gradient(op, s, grad_out, x, pre);
  check_grad_dtype(op, grad_dtype, x.scalar_type());
  const int type = is_bf16(op, "x", x);
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
  const auto gelu = kernels.gelu_bwd[type][tanh];
  torch::stable::parallel_for(0, blocks.count, blocks.grain(s.F),
                              [&](int64_t begin, int64_t end) { gelu(a, begin, end); });
  Tensor grad_b1 = new_tensor({s.F}, grad_dtype);
  cpu_kernels().linear->add_blocks[is_bf16(op, "grad_dtype", grad_dtype)](
      grad_b1.mutable_data_ptr(), a.partials, blocks.count, 2 * s.F, s.F);

  Tensor grad_w1 = new_tensor({s.F, s.C}, grad_dtype);
  mm_out(grad_w1, transposed(grad_pre), torch::stable::reshape(x, {s.N, s.C}));
  Tensor grad_w2 = new_tensor({s.C_out, s.F}, grad_dtype);
  mm_out(grad_w2, transposed(grad_rows), hidden);
  Tensor grad_x = new_tensor(x.sizes(), x.scalar_type());
  mm_out(torch::stable::view(grad_x, {s.N, s.C}), grad_pre, w1);
  return {grad_x, grad_w1, grad_b1, grad_w2,
          column_sums(grad_rows, s.N, s.C_out, type, grad_dtype)};
}

#ifdef FASTFORMER_WITH_CUDA

CublasLt &cublaslt() {
  static CublasLt library({"libcublasLt.so.13", "libcublasLt.so.12"});
  return library;
}

// Whether cuBLASLt is asked to end products in GELU. By default it is not: on some GPUs it takes
// longer than our own pass, and nobody has timed it here.
bool wants_epilogues() {
  static const bool wanted = [] {
    const char *setting = std::getenv("FASTFORMER_CUBLASLT");
    return setting != nullptr && std::strcmp(setting, "") != 0 && std::strcmp(setting, "0") != 0;
  }();
  return wanted;
}

// Why cuBLASLt does not end the products in GELU; null where it is asked to.
const char *no_epilogue(const Sizes &s, ScalarType type, bool tanh, bool drops) {
  if (!wants_epilogues())
    return "FASTFORMER_CUBLASLT=1 would let cuBLASLt's products end in it, which is untimed";
  if (!tanh)
    return "cuBLASLt's products end in the tanh form alone";
  if (drops)
    return "cuBLASLt's products do not end in dropout";
  if (type != ScalarType::BFloat16 && type != ScalarType::Half)
    return "cuBLASLt's products end in it in bfloat16 and float16 alone";
  if (s.F % 8 != 0 || s.N == 0)
    return "cuBLASLt's products end in it where F is a multiple of 8 and there are rows";
  const std::string &missing = cublaslt().missing();
  return missing.empty() ? nullptr : missing.c_str();
}

// For explanations: where GELU is computed for these arguments.
std::string mlp_epilogue(const Tensor &x, const Tensor &w1, const Tensor &w2, bool tanh,
                         bool drops) {
  const char *reason = no_epilogue(Sizes("mlp_fwd", x, w1, w2), x.scalar_type(), tanh, drops);
  return reason ? std::string("GELU has a pass of its own: ") + reason
                : "GELU ends products of " + cublaslt().description();
}

bool multiply(const EpilogueProduct &product, const Tensor &on, const CudaLaunch &launch) {
  std::optional<Tensor> scratch; // goes back to torch, which hands it out on this stream alone
  const auto workspace = [&](size_t bytes) {
    scratch = like(on, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    return scratch->mutable_data_ptr();
  };
  return cublaslt().multiply(product, on.get_device_index(), launch.stream(), workspace);
}

void check_rows(const char *op, const Sizes &s) {
  constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxCols = int64_t{1} << 30;
  STD_TORCH_CHECK(s.N < kMaxRows && s.F < kMaxCols && s.C_out < kMaxCols, op,
                  ": there must be less than 2**31 rows and 2**30 columns, got N ", s.N, ", F ",
                  s.F, ", C_out ", s.C_out);
}

void check_bias(const char *op, const char *name, const std::optional<Tensor> &bias, int64_t size,
                const Tensor &x) {
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == size &&
                            bias->scalar_type() == x.scalar_type()),
                  op, ": ", name, " must have shape (", size, ",) and the dtype of x, got ",
                  bias->numel(), " elements of ", bias->scalar_type());
}

// hidden = dropout(gelu(pre))
void gelu_cuda(const char *op, const CudaLaunch &launch, const Tensor &pre, const Tensor &hidden,
               bool tanh, double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  fastformer_gelu_fwd_args a{};
  a.pre = pre.const_data_ptr();
  a.hidden = hidden.mutable_data_ptr();
  a.N = pre.size(0);
  a.F = pre.size(1);
  a.type = dtype_index(op, "x", pre.scalar_type());
  a.tanh = tanh;
  set_dropout(op, a, dropout_p, rng, site);
  launch.check(fastformer_gelu_fwd(&a, launch.stream()), pre);
}

Tensor column_sums_cuda(const char *op, const CudaLaunch &launch, const Tensor &rows) {
  const int64_t N = rows.size(0), cols = rows.size(1);
  Tensor out = like(rows, {cols}, rows.scalar_type());
  Tensor sums = like(rows, {fastformer_mlp_sum_rows(N), cols}, ScalarType::Float);
  fastformer_column_sums_args a{};
  a.rows = rows.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.sums = static_cast<float *>(sums.mutable_data_ptr());
  a.N = N;
  a.F = cols;
  a.type = dtype_index(op, "grad_out", rows.scalar_type());
  launch.check(fastformer_column_sums(&a, launch.stream()), rows);
  return out;
}

std::tuple<Tensor, Tensor> mlp_fwd_cuda(const Tensor &x, const Tensor &w1,
                                        const std::optional<Tensor> &b1, const Tensor &w2,
                                        const std::optional<Tensor> &b2, bool tanh,
                                        double dropout_p, const std::optional<Tensor> &rng,
                                        int64_t site) {
  const char *op = "mlp_fwd";
  const CudaLaunch launch(op, x);
  const Sizes s(op, x, w1, w2);
  const ScalarType type = x.scalar_type();
  check_rows(op, s);
  check_bias(op, "b1", b1, s.F, x);
  check_bias(op, "b2", b2, s.C_out, x);
  const Tensor rows = torch::stable::reshape(x, {s.N, s.C});
  Tensor pre = like(x, {s.N, s.F}, type), hidden = like(x, {s.N, s.F}, type);
  bool done = false;
  if (no_epilogue(s, type, tanh, rng.has_value()) == nullptr) {
    const Tensor dense_x = torch::stable::contiguous(rows),
                 dense_w1 = torch::stable::contiguous(w1);
    std::optional<Tensor> dense_b1;
    if (b1)
      dense_b1 = torch::stable::contiguous(*b1);
    done = multiply(hidden_product({s.N, s.C, s.F, s.C_out}, type == ScalarType::BFloat16,
                                   dense_x.const_data_ptr(), dense_w1.const_data_ptr(),
                                   dense_b1 ? dense_b1->const_data_ptr() : nullptr,
                                   pre.mutable_data_ptr(), hidden.mutable_data_ptr()),
                    x, launch);
  }
  if (!done) {
    library_linear(pre, rows, w1, b1);
    gelu_cuda(op, launch, pre, hidden, tanh, dropout_p, rng, site);
  }
  Tensor out = like(x, out_shape(s, x), type);
  library_linear(torch::stable::view(out, {s.N, s.C_out}), hidden, w2, b2);
  return {out, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
mlp_bwd_cuda(const Tensor &grad_out, const Tensor &x, const Tensor &w1, const Tensor &w2,
             const Tensor &pre, bool tanh, double dropout_p, const std::optional<Tensor> &rng,
             int64_t site, ScalarType grad_dtype) {
  const char *op = "mlp_bwd";
  const CudaLaunch launch(op, x);
  const Sizes s(op, x, w1, w2);
  const ScalarType type = x.scalar_type();
  check_rows(op, s);
  check_gradient(op, s, grad_out, x, pre);
  const Tensor grad_rows =
      torch::stable::contiguous(torch::stable::reshape(grad_out, {s.N, s.C_out}));
  const Tensor saved = torch::stable::contiguous(torch::stable::reshape(pre, {s.N, s.F}));
  Tensor grad_pre = like(x, {s.N, s.F}, type), hidden = like(x, {s.N, s.F}, type);
  Tensor grad_b1 = like(x, {s.F}, type);
  const MlpSizes sizes{s.N, s.C, s.F, s.C_out};
  const bool bf16 = type == ScalarType::BFloat16;
  const bool ends = no_epilogue(s, type, tanh, rng.has_value()) == nullptr;

  bool done = false;
  if (ends) {
    const Tensor dense_w2 = torch::stable::contiguous(w2);
    done = multiply(grad_pre_product(sizes, bf16, grad_rows.const_data_ptr(),
                                     dense_w2.const_data_ptr(), saved.const_data_ptr(),
                                     grad_pre.mutable_data_ptr(), grad_b1.mutable_data_ptr()),
                    x, launch);
  }
  if (done) {
    gelu_cuda(op, launch, saved, hidden, tanh, dropout_p, rng, site);
  } else {
    library_mm(grad_pre, grad_rows, w2); // first the gradient of hidden
    Tensor sums = like(x, {fastformer_mlp_sum_rows(s.N), s.F}, ScalarType::Float);
    fastformer_gelu_bwd_args a{};
    a.pre = saved.const_data_ptr();
    a.grad = grad_pre.mutable_data_ptr();
    a.hidden = hidden.mutable_data_ptr();
    a.grad_bias = grad_b1.mutable_data_ptr();
    a.sums = static_cast<float *>(sums.mutable_data_ptr());
    a.N = s.N;
    a.F = s.F;
    a.type = dtype_index(op, "x", type);
    a.tanh = tanh;
    set_dropout(op, a, dropout_p, rng, site);
    launch.check(fastformer_gelu_bwd(&a, launch.stream()), pre);
  }

  Tensor grad_w2 = like(x, {s.C_out, s.F}, type), grad_b2 = like(x, {s.C_out}, type);
  done = ends &&
         multiply(grad_w2_product(sizes, bf16, grad_rows.const_data_ptr(), hidden.const_data_ptr(),
                                  grad_w2.mutable_data_ptr(), grad_b2.mutable_data_ptr()),
                  x, launch);
  if (!done) {
    library_mm(grad_w2, transposed(grad_rows), hidden);
    grad_b2 = column_sums_cuda(op, launch, grad_rows);
  }
  Tensor grad_w1 = like(x, {s.F, s.C}, type);
  library_mm(grad_w1, transposed(grad_pre), torch::stable::reshape(x, {s.N, s.C}));
  Tensor grad_x = like(x, x.sizes(), type);
  library_mm(torch::stable::view(grad_x, {s.N, s.C}), grad_pre, w1);
  const auto wide = [&](const Tensor &grad) { return torch::stable::to(grad, grad_dtype); };
  return {grad_x, wide(grad_w1), wide(grad_b1), wide(grad_w2), wide(grad_b2)};
}
#endif

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("mlp_fwd.cpu", TORCH_BOX(&mlp_fwd));
  m.impl("mlp_bwd.cpu", TORCH_BOX(&mlp_bwd));
}

#ifdef FASTFORMER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastformer, CUDA, m) {
  m.impl("mlp_fwd.cuda", TORCH_BOX(&mlp_fwd_cuda));
  m.impl("mlp_bwd.cuda", TORCH_BOX(&mlp_bwd_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastformer, CompositeExplicitAutograd, m) {
  m.impl("mlp_epilogue", TORCH_BOX(&mlp_epilogue));
}
#endif

} // namespace fastformer
