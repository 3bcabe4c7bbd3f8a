// Binding of the op linear_cross_entropy_fwd.
//
// Memory: the logits of one chunk of rows, which become their own gradient, in a block that is kept
// for the next call; the rows that count, gathered, and the gradient's rows before they are spread,
// unless all rows count; with several chunks, a float32 sum of a bfloat16 weight's gradient.
#include "ops/binding.h"
#include "ops/gemm.h"
#include "ops/memory.h"
#include "ops/rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace fastformer {
namespace {

constexpr int64_t kChunkBytes = int64_t{64} << 20;
constexpr int64_t kLeastRows = 128; // the weight is read once more for every chunk

// A pair of equal vectors: which rows count, and their targets.
struct Counted {
  std::vector<int64_t> rows, targets;
};

// Raises ValueError for a target out of range (which is what std::invalid_argument becomes).
Counted counted_rows(const Tensor &targets, int64_t ignore_index, int64_t V) {
  const Tensor dense = torch::stable::contiguous(targets);
  const int64_t *target = static_cast<const int64_t *>(dense.const_data_ptr());
  const int64_t N = dense.numel();
  Counted counted;
  counted.rows.reserve(static_cast<size_t>(N));
  counted.targets.reserve(static_cast<size_t>(N));
  for (int64_t row = 0; row < N; ++row) {
    if (target[row] == ignore_index)
      continue;
    if (target[row] < 0 || target[row] >= V)
      throw std::invalid_argument("linear_cross_entropy: targets must be in [0, " +
                                  std::to_string(V) + ") or equal ignore_index, got " +
                                  std::to_string(target[row]));
    counted.rows.push_back(row);
    counted.targets.push_back(target[row]);
  }
  return counted;
}

int64_t row_bytes(const Tensor &matrix) {
  return matrix.size(1) * static_cast<int64_t>(matrix.element_size());
}

// Copies rows between two contiguous matrices: to[to_row(i)] = from[from_row(i)].
template <class To, class From>
void copy_rows(const Tensor &to, To to_row, const Tensor &from, From from_row, int64_t count) {
  const int64_t bytes = row_bytes(from);
  char *out = static_cast<char *>(to.mutable_data_ptr());
  const char *in = static_cast<const char *>(from.const_data_ptr());
  torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(out + to_row(i) * bytes, in + from_row(i) * bytes, static_cast<size_t>(bytes));
  });
}

Tensor rows_of(const Tensor &matrix, int64_t first, int64_t count) {
  Tensor all = matrix;
  return torch::stable::narrow(all, 0, first, count);
}

// Adds up the gradient of the weight chunk by chunk: several in float32, to be rounded at the end.
class WeightGradient {
public:
  WeightGradient(const Tensor &weight, bool several_chunks, ScalarType dtype)
      : dtype_(dtype),
        grad_(new_tensor(weight.sizes(), several_chunks ? ScalarType::Float : dtype)) {}

  void add(const Tensor &grad_logits, const Tensor &rows) {
    (first_ ? mm_out : mm_add)(grad_, transposed(grad_logits), rows);
    first_ = false;
  }

  Tensor result() {
    if (first_)
      torch::stable::zero_(grad_);
    return torch::stable::to(grad_, dtype_);
  }

private:
  ScalarType dtype_;
  Tensor grad_;
  bool first_ = true;
};

// Runs the kernel on a chunk. Blocks of rows, whose number depends only on that of the rows, sum
// the bias gradient on their own, so that the threads do not show in it.
void loss_of_rows(const Tensor &logits, const int64_t *targets, const cpu::CrossEntropy &loss,
                  double *losses, const std::optional<Tensor> &bias_sums) {
  const int64_t rows = logits.size(0), V = logits.size(1);
  const int64_t blocks = std::min<int64_t>(64, (rows + 7) / 8);
  const cpu::Kernels &kernels = cpu_kernels();
  std::optional<Tensor> partial;
  if (bias_sums.has_value())
    partial = new_tensor({blocks + 1, V}, bias_sums->scalar_type()); // the last: sums so far
  float *partial_data =
      partial.has_value() ? static_cast<float *>(partial->mutable_data_ptr()) : nullptr;
  void *data = logits.mutable_data_ptr();
  const bool is_f32 = logits.scalar_type() == ScalarType::Float;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
      float *sums = partial_data ? partial_data + block * V : nullptr;
      if (sums)
        std::fill(sums, sums + V, 0.0f);
      if (is_f32)
        kernels.linear_cross_entropy->rows_f32(static_cast<float *>(data) + first * V,
                                               targets + first, count, loss, losses + first, sums);
      else
        kernels.linear_cross_entropy->rows_bf16(static_cast<cpu::bf16 *>(data) + first * V,
                                                targets + first, count, loss, losses + first, sums);
    }
  });
  if (!partial.has_value())
    return;
  float *sums = static_cast<float *>(bias_sums->mutable_data_ptr());
  torch::stable::parallel_for(0, V, 4096, [&](int64_t begin, int64_t end) {
    std::copy(sums + begin, sums + end, partial_data + blocks * V + begin);
    kernels.linear->add_blocks[0](sums + begin, partial_data + begin, blocks + 1, V, end - begin);
  });
}

void check(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias,
           const Tensor &targets) {
  const char *op = "linear_cross_entropy_fwd";
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": x must be float32 or bfloat16");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, op, ": x and weight must have one dtype");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1), op,
                  ": x must be (N, C) and weight (V, C)");
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                                        (bias->scalar_type() == ScalarType::Float ||
                                         bias->scalar_type() == ScalarType::BFloat16)),
                  op, ": bias must be (V,), float32 or bfloat16");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 &&
                      targets.size(0) == x.size(0),
                  op, ": targets must be int64 (N,)");
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
linear_cross_entropy_fwd_cpu(const Tensor &x, const Tensor &weight,
                             const std::optional<Tensor> &bias, const Tensor &targets,
                             int64_t ignore_index, double label_smoothing, double z_loss, bool mean,
                             bool /*mostly_ignored: ignored rows never cost anything here*/,
                             std::optional<ScalarType> grad_dtype) {
  check(x, weight, bias, targets);
  const bool needs_grad = grad_dtype.has_value();
  if (needs_grad)
    check_grad_dtype("linear_cross_entropy_fwd", *grad_dtype, x.scalar_type());
  const int64_t N = x.size(0), C = x.size(1), V = weight.size(0);
  const Counted counted = counted_rows(targets, ignore_index, V);
  const int64_t count = static_cast<int64_t>(counted.rows.size());
  const bool all = count == N;

  Tensor rows = torch::stable::contiguous(x);
  if (!all) {
    const Tensor gathered = new_tensor({count, C}, x.scalar_type());
    copy_rows(
        gathered, [](int64_t i) { return i; }, rows, [&](int64_t i) { return counted.rows[i]; },
        count);
    rows = gathered;
  }
  std::optional<Tensor> wide_bias, bias_sums;
  if (bias.has_value()) {
    wide_bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
    if (needs_grad)
      bias_sums = torch::stable::new_zeros(x, {V}, ScalarType::Float);
  }
  cpu::CrossEntropy loss{};
  loss.bias = bias.has_value() ? static_cast<const float *>(wide_bias->const_data_ptr()) : nullptr;
  loss.vocabulary = V;
  loss.label_smoothing = label_smoothing;
  loss.z_loss = z_loss;
  loss.share = mean ? 1.0 / static_cast<double>(std::max<int64_t>(count, 1)) : 1.0;
  loss.needs_grad = needs_grad;

  // Chunks of one size, but for a row more or less.
  const int64_t logits_bytes = V * static_cast<int64_t>(x.element_size());
  const int64_t most = std::max(kLeastRows, kChunkBytes / std::max<int64_t>(logits_bytes, 1));
  const int64_t chunks = (count + most - 1) / most;
  const int64_t longest = chunks ? (count + chunks - 1) / chunks : 0;
  const Tensor logits = new_tensor({longest, V}, x.scalar_type());
  const Tensor grad_rows = new_tensor({needs_grad ? count : 0, C}, x.scalar_type());
  std::optional<WeightGradient> grad_weight;
  if (needs_grad)
    grad_weight.emplace(weight, chunks > 1, *grad_dtype);
  std::vector<double> losses(static_cast<size_t>(count));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = count * chunk / chunks;
    const int64_t size = count * (chunk + 1) / chunks - first;
    const Tensor chunk_rows = rows_of(rows, first, size);
    const Tensor chunk_logits = rows_of(logits, 0, size);
    mm_out(chunk_logits, chunk_rows, transposed(weight));
    loss_of_rows(chunk_logits, counted.targets.data() + first, loss, losses.data() + first,
                 bias_sums);
    if (needs_grad) {
      mm_out(rows_of(grad_rows, first, size), chunk_logits, weight);
      grad_weight->add(chunk_logits, chunk_rows);
    }
  }

  double total = 0.0;
  for (const double one : losses)
    total += one;
  const Tensor result = new_tensor({}, ScalarType::Float);
  *static_cast<float *>(result.mutable_data_ptr()) = static_cast<float>(total * loss.share);
  const Tensor none = new_tensor({0}, x.scalar_type());
  if (!needs_grad)
    return {result, none, new_tensor({0}, x.scalar_type()), new_tensor({0}, x.scalar_type())};
  Tensor grad_x = grad_rows;
  if (!all) {
    grad_x = new_tensor({N, C}, x.scalar_type());
    torch::stable::zero_(grad_x);
    copy_rows(
        grad_x, [&](int64_t i) { return counted.rows[i]; }, grad_rows, [](int64_t i) { return i; },
        count);
  }
  return {result, grad_x, grad_weight->result(),
          bias.has_value() ? torch::stable::to(*bias_sums, *grad_dtype) : none};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("linear_cross_entropy_fwd.cpu", TORCH_BOX(&linear_cross_entropy_fwd_cpu));
}

} // namespace fastformer
