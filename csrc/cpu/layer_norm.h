// LayerNorm on the CPU, alone and fused with the residual addition and dropout before it.
#pragma once
#include "cpu/bf16.h"
#include "cpu/dropout.h"

#include <cstdint>

namespace fastformer::cpu {

// Matrices are (rows, C) and contiguous; statistics, weight and bias float32.
struct LayerNormForward {
  const void *x;              // the branch that is added to the residual; unused without addition
  const void *residual;       // the rows to be normalised, where nothing is added
  const float *weight, *bias; // bias may be null
  void *new_residual;         // residual + dropout(x)
  void *normed;
  float *mean, *rstd;
  int64_t C;
  float eps;
  Dropout dropout;
};

struct LayerNormBackward {
  const void *grad_normed;
  const void *grad_new_residual; // may be null
  const void *rows;              // what was normalised
  const float *weight, *mean, *rstd;
  void *grad_rows;
  void *grad_x;    // the branch's; unused without addition
  float *partials; // (blocks, 2, C): sums for the gradients of weight and bias
  int64_t N, C, rows_per_block;
  Dropout dropout;
};

// Indices say which type is bfloat16 rather than float32.
struct LayerNormKernels {
  // Rows [begin, end).
  void (*fwd[2][2])(const LayerNormForward &, int64_t begin, int64_t end);        // rows, normed
  void (*add_fwd[2][2][2])(const LayerNormForward &, int64_t begin, int64_t end); // x, rows, normed
  // Blocks of rows [begin, end).
  void (*bwd[2][2])(const LayerNormBackward &, int64_t begin, int64_t end); // rows, normed
  void (*add_bwd[2][2][2])(const LayerNormBackward &, int64_t begin,
                           int64_t end); // x, rows, normed
};

} // namespace fastformer::cpu
