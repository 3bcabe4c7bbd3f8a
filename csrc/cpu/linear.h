// Linear layer on the CPU: what is left to do beside its matrix products. The other ops that have a
// bias, or sum over rows, use these too.
#pragma once
#include "cpu/bf16.h"

#include <cstdint>

namespace fastformer::cpu {

// The index says whether a matrix, or a result, is bfloat16 rather than float32.
struct LinearKernels {
  // Adds a vector to rows [begin, end) of a contiguous matrix.
  void (*add_bias[2])(void *rows, const float *bias, int64_t begin, int64_t end, int64_t cols);

  // partials (blocks, cols): the column sums of each block of rows.
  void (*column_sums[2])(float *partials, const void *rows, int64_t block_begin, int64_t block_end,
                         int64_t N, int64_t cols, int64_t rows_per_block);

  // out[col] = the sum over blocks of partials[block * stride + col], in order.
  void (*add_blocks[2])(void *out, const float *partials, int64_t blocks, int64_t stride,
                        int64_t cols);

  // out[i] = in[i], or out[i] += in[i], for i in [begin, end).
  void (*to_float32)(float *out, const bf16 *in, int64_t begin, int64_t end);
  void (*accumulate)(float *out, const bf16 *in, int64_t begin, int64_t end);
};

} // namespace fastformer::cpu
