// Linear layer on the CPU: what is left to do beside its matrix products.
#pragma once
#include "cpu/bf16.h"

#include <cstdint>

namespace fastformer::cpu {

struct LinearKernels {
  // Adds `bias` to each row of `out` (rows, cols).
  void (*add_bias)(bf16 *out, const bf16 *bias, int64_t rows, int64_t cols);

  // Adds to `sums` (cols) the sums of the columns of `x`, whose rows are `stride` elements apart.
  void (*column_sums_f32)(float *sums, const float *x, int64_t rows, int64_t cols, int64_t stride);
  void (*column_sums_bf16)(float *sums, const bf16 *x, int64_t rows, int64_t cols, int64_t stride);
};

} // namespace fastformer::cpu
