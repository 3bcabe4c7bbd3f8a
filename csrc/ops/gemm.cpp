#include "ops/gemm.h"
#include "ops/binding.h"
#include "ops/memory.h"
#include "ops/rows.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastformer {
namespace {

// With fewer, packing the other operand does not pay; and the same against PyTorch's own loops.
constexpr int64_t kLeastRows = 16, kLeastRowsForLoops = 4;

enum class Choice { own, library, measured };

Choice asked() {
  static const Choice choice = [] {
    const char *setting = std::getenv("FASTFORMER_CPU_GEMM");
    const std::string asked = setting == nullptr ? "" : setting;
    if (asked.empty())
      return Choice::measured;
    if (asked != "own" && asked != "library")
      throw std::invalid_argument("FASTFORMER_CPU_GEMM must be own, library or unset, got " +
                                  asked);
    return asked == "own" ? Choice::own : Choice::library;
  }();
  return choice;
}

#if defined(__x86_64__)
bool libraries_lack_bf16() {
  static const bool lack = (__builtin_cpu_init(), !__builtin_cpu_supports("avx512f"));
  return lack;
}
bool is_amd() {
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return amd;
}
#else
bool libraries_lack_bf16() { return false; }
bool is_amd() { return false; }
#endif

// Whether our kernels are the faster ones, for `rows` of A. On AMD cores with AVX-512 they take 9
// to 20 % less time than MKL in float32, on Zen 5 half of its time, and up to 8 % less than oneDNN
// in bfloat16. On Intel's cores these libraries are at home, and AMX is theirs alone. Without
// AVX-512 they have no kernel for bfloat16, and PyTorch multiplies such matrices ten to thirty
// times slower than float32.
bool wins(int type, int64_t rows, const cpu::GemmKernels &kernels) {
  const bool is_bf16 = type == 1;
  if (libraries_lack_bf16())
    return is_bf16 && rows >= kLeastRowsForLoops;
  return is_amd() && !(is_bf16 && kernels.widens_bf16) && rows >= kLeastRows;
}

bool chosen(int type, int64_t rows, const cpu::GemmKernels &kernels) {
  return asked() == Choice::own || (asked() == Choice::measured && wins(type, rows, kernels));
}

// Whether bfloat16 pairs lie side by side: those of neighbouring columns, in even rows.
bool has_pairs(int64_t K, int64_t row) { return K % 2 == 0 && row % 2 == 0; }

bool suits(const cpu::Gemm &g, int type, const cpu::GemmKernels &kernels) {
  if (!chosen(type, g.M, kernels) || g.M == 0 || g.N == 0 || g.K == 0)
    return false;
  if ((g.a_col != 1 && g.a_row != 1) || (g.b_col != 1 && g.b_row != 1))
    return false;
  const bool even_a = g.a_col != 1 || has_pairs(g.K, g.a_row);
  const bool even_b = g.b_col == 1 || has_pairs(g.K, 0);
  return type == 0 || kernels.widens_bf16 || (even_a && even_b);
}

// Returns false where the kernel cannot, or should not, take this product.
bool multiply(const Tensor &out, const Tensor &a, const Tensor &b, const float *bias, bool add) {
  const cpu::GemmKernels &kernels = *cpu_kernels().gemm;
  const int type = is_bf16("mm", "a", a), out_type = is_bf16("mm", "out", out);
  cpu::Gemm g{};
  g.M = a.size(0);
  g.K = a.size(1);
  g.N = b.size(1);
  g.a = a.const_data_ptr();
  g.a_row = a.stride(0);
  g.a_col = a.stride(1);
  g.b = b.const_data_ptr();
  g.b_row = b.stride(0);
  g.b_col = b.stride(1);
  g.out = out.mutable_data_ptr();
  g.out_row = g.N;
  g.bias = bias;
  g.add = add;
  if (!suits(g, type, kernels))
    return false;
  const auto floats_for = [](int64_t bytes) { return new_tensor({bytes / 4}, ScalarType::Float); };
  const Tensor packed = floats_for(kernels.packed_bytes(g, type));
  g.packed = packed.mutable_data_ptr();
  g.block_rows = kernels.block_rows(g);
  const int64_t panels = kernels.panels(g), blocks = (g.M + g.block_rows - 1) / g.block_rows;
  torch::stable::parallel_for(
      0, panels, 1, [&](int64_t begin, int64_t end) { kernels.pack[type](g, begin, end); });
  torch::stable::parallel_for(0, blocks * panels, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = floats_for(kernels.scratch_bytes[type](g, end - begin));
    kernels.multiply[type][out_type](g, scratch.mutable_data_ptr(), begin, end);
  });
  return true;
}

// out = added + a b, where `added` broadcasts to the product's shape and may be `out` itself.
void library_addmm(const Tensor &out, const Tensor &added, const Tensor &a, const Tensor &b) {
  // Not through the dispatcher, whose stable interface has no word for a Scalar.
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
}

// The libraries' product of bfloat16 matrices is bfloat16: `finish` takes it to a float32 `out`.
void widened_mm(const Tensor &out, const Tensor &a, const Tensor &b,
                void (*finish)(float *, const cpu::bf16 *, int64_t, int64_t)) {
  const Tensor product = new_tensor(out.sizes(), a.scalar_type());
  library_mm(product, a, b);
  float *to = static_cast<float *>(out.mutable_data_ptr());
  const cpu::bf16 *from = static_cast<const cpu::bf16 *>(product.const_data_ptr());
  torch::stable::parallel_for(0, out.numel(), 65536,
                              [&](int64_t begin, int64_t end) { finish(to, from, begin, end); });
}

} // namespace

void library_mm(const Tensor &out, const Tensor &a, const Tensor &b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

void library_linear(const Tensor &out, const Tensor &x, const Tensor &weight,
                    const std::optional<Tensor> &bias) {
  if (!bias)
    return library_mm(out, x, transposed(weight));
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

void mm_out(const Tensor &out, const Tensor &a, const Tensor &b) {
  if (multiply(out, a, b, nullptr, false))
    return;
  if (out.scalar_type() == a.scalar_type())
    library_mm(out, a, b);
  else
    widened_mm(out, a, b, cpu_kernels().linear->to_float32);
}

void mm_bias_out(const Tensor &out, const Tensor &a, const Tensor &b, const Tensor &bias) {
  if (multiply(out, a, b, floats(bias), false))
    return;
  if (out.scalar_type() == ScalarType::Float)
    return library_addmm(out, bias, a, b);
  // In bfloat16 oneDNN's own addition costs more than this pass.
  library_mm(out, a, b);
  add_row_bias(out.mutable_data_ptr(), bias, out.size(0), out.size(1), 1);
}

void mm_add(const Tensor &out, const Tensor &a, const Tensor &b) {
  if (multiply(out, a, b, nullptr, true))
    return;
  if (out.scalar_type() == a.scalar_type())
    library_addmm(out, out, a, b);
  else
    widened_mm(out, a, b, cpu_kernels().linear->accumulate);
}

} // namespace fastformer
