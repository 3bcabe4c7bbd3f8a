// The products of the feed-forward layer that cuBLASLt can end: in tanh GELU forward, in its slope
// and the sums for b1 backward, and beside the gradient of w2 that of b2.
#pragma once
#include "cuda/cublaslt.h"

namespace fastformer {

// x (N, C), w1 (F, C), w2 (C_out, F).
struct MlpSizes {
  int64_t N, C, F, C_out;
};

// pre = x w1^T + b1 and hidden = gelu(pre); b1 may be null.
inline EpilogueProduct hidden_product(const MlpSizes &s, bool bf16, const void *x, const void *w1,
                                      const void *b1, void *pre, void *hidden) {
  EpilogueProduct p{};
  p.a = x;
  p.b = w1;
  p.b_transposed = true;
  p.out = hidden;
  p.M = s.N;
  p.N = s.F;
  p.K = s.C;
  p.bf16 = bf16;
  p.epilogue = b1 ? Epilogue::kGeluAuxBias : Epilogue::kGeluAux;
  p.bias = const_cast<void *>(b1);
  p.aux = pre;
  return p;
}

// grad_pre = grad_out w2 * gelu'(pre), and its column sums.
inline EpilogueProduct grad_pre_product(const MlpSizes &s, bool bf16, const void *grad_out,
                                        const void *w2, const void *pre, void *grad_pre,
                                        void *grad_b1) {
  EpilogueProduct p{};
  p.a = grad_out;
  p.b = w2;
  p.out = grad_pre;
  p.M = s.N;
  p.N = s.F;
  p.K = s.C_out;
  p.bf16 = bf16;
  p.epilogue = Epilogue::kDgeluBgrad;
  p.bias = grad_b1;
  p.aux = const_cast<void *>(pre);
  return p;
}

// grad_w2 = grad_out^T hidden, and the column sums of grad_out.
inline EpilogueProduct grad_w2_product(const MlpSizes &s, bool bf16, const void *grad_out,
                                       const void *hidden, void *grad_w2, void *grad_b2) {
  EpilogueProduct p{};
  p.a = grad_out;
  p.a_transposed = true;
  p.b = hidden;
  p.out = grad_w2;
  p.M = s.C_out;
  p.N = s.F;
  p.K = s.N;
  p.bf16 = bf16;
  p.epilogue = Epilogue::kBgradB;
  p.bias = grad_b2;
  return p;
}

} // namespace fastformer
