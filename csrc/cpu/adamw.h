// AdamW on the CPU: one pass over a parameter and its state.
#pragma once
#include "cpu/bf16.h"

#include <cstdint>

namespace fastformer::cpu {

// Decoupled weight decay and both bias corrections, as factors of one step.
struct AdamwStep {
  float decay; // 1 - lr weight_decay
  float rest1; // 1 - beta1, rounded once: beta may be as near to 1 as 0.999
  float beta2;
  float rest2;     // 1 - beta2
  float size;      // lr / (1 - beta1^t)
  float root_size; // 1 / sqrt(1 - beta2^t)
  float eps;
};

struct AdamwKernels {
  // Updates n elements; `copy`, unless null, receives the new parameter in bfloat16.
  void (*step)(float *param, const float *grad, float *exp_avg, float *exp_avg_sq, bf16 *copy,
               int64_t n, const AdamwStep &step);
};

} // namespace fastformer::cpu
