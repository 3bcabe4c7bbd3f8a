// Cross-entropy on the CPU: rows of logits that become their own gradient.
#pragma once
#include "cpu/bf16.h"

#include <cstdint>

namespace fastformer::cpu {

struct CrossEntropy {
  const float *bias; // (V,), or null
  int64_t vocabulary;
  double label_smoothing, z_loss;
  double share; // of one row in the loss: 1, or 1 / rows for the mean
  bool needs_grad;
};

struct LinearCrossEntropyKernels {
  // Writes the losses, not yet multiplied by their share, of rows of `logits` (rows, V), to which
  // the bias has not been added. If gradients are needed the logits become theirs, and their
  // columns are added to `bias_sums` (V,) unless it is null.
  void (*rows_f32)(float *logits, const int64_t *targets, int64_t rows, const CrossEntropy &loss,
                   double *losses, float *bias_sums);
  void (*rows_bf16)(bf16 *logits, const int64_t *targets, int64_t rows, const CrossEntropy &loss,
                    double *losses, float *bias_sums);
};

} // namespace fastformer::cpu
