// Dropout on the CPU: what a kernel needs to draw a mask, and the op that only draws one.
#pragma once
#include <cstdint>

namespace fastformer::cpu {

// See fastformer/ops/dropout.py for the definition. threshold 0 means that nothing is dropped.
struct Dropout {
  uint64_t seed = 0;
  uint64_t stream = 0; // offset + site
  uint32_t threshold = 0;
  float scale = 1.0f;
};

struct DropoutKernels {
  // Fills the draws [begin, end) of a (rows, cols) mask, counted row by row, ceil(cols / 8) in a
  // row; each draw makes eight neighbouring elements.
  void (*mask)(bool *keep, int64_t begin, int64_t end, int64_t cols, const Dropout &dropout);
};

} // namespace fastformer::cpu
