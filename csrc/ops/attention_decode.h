// The CUDA kernel of attention from few queries, as the binding of attention calls it.
#pragma once
#include "ops/binding.h"

#include <tuple>

namespace fastformer {

// out (B, T, H, D) and lse (B, H, T) of q (B, T, H, D), at most kDecodeMaxQueries tokens, and k and
// v (B, S, H, D); no weights are dropped.
std::tuple<Tensor, Tensor> decode_fwd(const char *op, const Tensor &q, const Tensor &k,
                                      const Tensor &v, const std::optional<Tensor> &key_lengths,
                                      bool causal, double scale);

} // namespace fastformer
