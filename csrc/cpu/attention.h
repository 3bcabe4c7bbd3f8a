// Attention on the CPU: one (sequence, head) is one task, forward and backward.
#pragma once
#include "cpu/bf16.h"
#include "cpu/dropout.h"

#include <cstddef>
#include <cstdint>

namespace fastformer::cpu {

// A tensor (batch, tokens, H, D) whose last dimension is contiguous; strides in elements.
template <class Pointer> struct AttentionOperand {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

struct AttentionArgs {
  AttentionOperand<const void *> q, k, v;
  AttentionOperand<void *> out;                   // written by forward
  AttentionOperand<const void *> saved_out, grad; // read by backward
  AttentionOperand<void *> grad_q, grad_k, grad_v;
  float *lse = nullptr;
  // Padded batches may have key_lengths; packed ones have both cu_seqlens and batch strides of 0.
  const int32_t *key_lengths = nullptr;
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  int64_t batch = 0, T = 0, S = 0, H = 0, D = 0;
  int64_t lse_head_stride = 0, lse_batch_stride = 0;
  bool bf16 = false, causal = false;
  float scale = 0.0f;
  Dropout dropout;
};

// `task` counts (sequence, head) pairs, the heads of a sequence next to each other. `workspace` has
// the size asked for and is aligned to 64 bytes; threads do not share it.
struct AttentionForwardKernels {
  size_t (*workspace)(const AttentionArgs &args);
  void (*run)(const AttentionArgs &args, int64_t task, void *workspace);
};

struct AttentionBackwardKernels {
  size_t (*workspace)(const AttentionArgs &args);
  void (*run)(const AttentionArgs &args, int64_t task, void *workspace);
};

} // namespace fastformer::cpu
