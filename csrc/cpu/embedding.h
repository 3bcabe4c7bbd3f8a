// Gradient of an embedding's table on the CPU.
#pragma once
#include <cstdint>

namespace fastformer::cpu {

// The index says whether gradients are bfloat16 rather than float32.
struct EmbeddingKernels {
  // Row v of `out`, for v in [begin, end): the sum of those rows of `grad` that
  // tokens[starts[v], starts[v + 1]) names, and zeros if that is none. Both have C columns.
  void (*sum_tokens[2])(void *out, const void *grad, const int32_t *tokens, const int32_t *starts,
                        int64_t begin, int64_t end, int64_t C);
};

} // namespace fastformer::cpu
