// The passes of the feed-forward layer around its matrix products.
#pragma once
#include "cpu/bf16.h"
#include "cpu/dropout.h"

#include <cstdint>

namespace fastformer::cpu {

// Matrices are (rows, F) and contiguous.
struct GeluForward {
  void *pre;         // with a bias: the product on entry, product + bias on return
  const float *bias; // may be null
  void *hidden;      // dropout(gelu(pre))
  int64_t F;
  Dropout dropout;
};

struct GeluBackward {
  const void *pre;
  void *grad; // of hidden on entry, of pre on return
  void *hidden;
  float *partials; // (blocks, 2, F): [:, 0] column sums of the gradient of pre, [:, 1] scratch
  int64_t N, F, rows_per_block;
  Dropout dropout;
};

struct MlpKernels {
  // The first index says whether the type is bfloat16 rather than float32, the second which form of
  // GELU: 0 erf, 1 tanh.
  void (*gelu_fwd[2][2])(const GeluForward &, int64_t row_begin, int64_t row_end);
  void (*gelu_bwd[2][2])(const GeluBackward &, int64_t block_begin, int64_t block_end);
  // Adds a vector to rows [begin, end) of a matrix.
  void (*add_bias[2])(void *rows, const float *bias, int64_t begin, int64_t end, int64_t cols);
  // partials (blocks, cols): the column sums of each block of rows.
  void (*column_sums[2])(float *partials, const void *rows, int64_t block_begin, int64_t block_end,
                         int64_t N, int64_t cols, int64_t rows_per_block);
  void (*add_blocks[2])(void *out, const float *partials, int64_t blocks, int64_t stride,
                        int64_t cols);
};

} // namespace fastformer::cpu
