// What the bindings of row-wise CPU kernels share: operands as contiguous rows of float32 or
// bfloat16, and rows cut into blocks.
#pragma once
#include "ops/binding.h"
#include "ops/memory.h"

#include <algorithm>

namespace fastformer {

// 1 for bfloat16, 0 for float32: the index into tables of kernels.
inline int is_bf16(const char *op, const char *name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": ", name,
                  " must be float32 or bfloat16, got ", type);
  return type == ScalarType::BFloat16;
}
inline int is_bf16(const char *op, const char *name, const Tensor &t) {
  return is_bf16(op, name, t.scalar_type());
}

// The sizes of x (..., C) seen as N rows.
struct RowShape {
  RowShape(const char *op, const Tensor &x) : N(1), C(0) {
    STD_TORCH_CHECK(x.dim() > 0, op, ": x must be (..., C), got a scalar");
    for (int64_t i = 0; i + 1 < x.dim(); ++i)
      N *= x.size(i);
    C = x.size(-1);
  }

  int64_t N, C;
};

// A vector of weights in float32, whatever it is stored in.
inline Tensor float_vector(const char *op, const char *name, const Tensor &t, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, op, ": ", name, " must have shape (", size,
                  ",), got ", t.numel(), " elements in ", t.dim(), " dimensions");
  return torch::stable::contiguous(is_bf16(op, name, t) ? torch::stable::to(t, ScalarType::Float)
                                                        : t);
}

inline const float *floats(const Tensor &t) {
  return static_cast<const float *>(t.const_data_ptr());
}

// How many rows are worth a thread of their own.
inline int64_t row_grain(int64_t cols) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
}

// Rows cut into blocks whose column sums are added in order. The cut depends on the number of rows
// alone, so that the sums do not depend on the number of threads.
struct RowBlocks {
  explicit RowBlocks(int64_t rows)
      : rows_per_block(std::max<int64_t>(32, (rows + 511) / 512 * 8)),
        count((rows + rows_per_block - 1) / rows_per_block) {}

  int64_t grain(int64_t cols) const { return (row_grain(cols) - 1) / rows_per_block + 1; }

  int64_t rows_per_block, count;
};

// The gradients of the weights of ops that compute in `dtype`: float32 ones need no cast where the
// weights are float32 masters.
inline void check_grad_dtype(const char *op, ScalarType grad_dtype, ScalarType dtype) {
  STD_TORCH_CHECK(grad_dtype == dtype || grad_dtype == ScalarType::Float, op,
                  ": grad_dtype must be float32 or that of x, got ", grad_dtype, " for x ", dtype);
}

// Adds `bias` to each of the rows of a contiguous matrix.
inline void add_row_bias(void *rows, const Tensor &bias, int64_t N, int64_t cols, int type) {
  const auto kernel = cpu_kernels().linear->add_bias[type];
  torch::stable::parallel_for(0, N, row_grain(cols), [&](int64_t begin, int64_t end) {
    kernel(rows, floats(bias), begin, end, cols);
  });
}

// The sums of the columns of a contiguous matrix.
inline Tensor column_sums(const Tensor &rows, int64_t N, int64_t cols, int type,
                          ScalarType out_dtype) {
  const cpu::LinearKernels &kernels = *cpu_kernels().linear;
  const RowBlocks blocks(N);
  Tensor partials = new_tensor({blocks.count, cols}, ScalarType::Float);
  float *sums = static_cast<float *>(partials.mutable_data_ptr());
  const void *in = rows.const_data_ptr();
  torch::stable::parallel_for(0, blocks.count, blocks.grain(cols), [&](int64_t begin, int64_t end) {
    kernels.column_sums[type](sums, in, begin, end, N, cols, blocks.rows_per_block);
  });
  Tensor out = new_tensor({cols}, out_dtype);
  kernels.add_blocks[out_dtype == ScalarType::BFloat16](out.mutable_data_ptr(), sums, blocks.count,
                                                        cols, cols);
  return out;
}

} // namespace fastformer
