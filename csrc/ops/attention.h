// What the bindings of attention on the CPU and on the GPU share: checks of their arguments.
#pragma once
#include "ops/binding.h"

namespace fastformer {

// `other` is what a kernel takes beside bfloat16.
inline void check_operands(const char *op, const Tensor &q, const Tensor &k, const Tensor &v,
                           int dims, ScalarType other) {
  const auto dtype = q.scalar_type();
  STD_TORCH_CHECK(q.dim() == dims && k.dim() == dims && v.dim() == dims, op,
                  ": q, k and v must have ", dims, " dimensions, got ", q.dim(), ", ", k.dim(),
                  " and ", v.dim());
  STD_TORCH_CHECK((dtype == other || dtype == ScalarType::BFloat16) && k.scalar_type() == dtype &&
                      v.scalar_type() == dtype,
                  op, ": q, k and v must all be ",
                  other == ScalarType::Half ? "float16" : "float32", " or all bfloat16");
  const int64_t H = q.size(dims - 2), D = q.size(dims - 1);
  STD_TORCH_CHECK(D > 0 && D % 8 == 0 && D <= 128, op,
                  ": head_dim must be a multiple of 8 and at most 128, got ", D);
  for (const Tensor *t : {&k, &v}) {
    STD_TORCH_CHECK(t->size(dims - 2) == H && t->size(dims - 1) == D &&
                        t->size(dims - 3) == k.size(dims - 3),
                    op, ": q, k and v must agree in heads and head_dim, k and v in tokens");
    STD_TORCH_CHECK(dims == 3 || t->size(0) == q.size(0), op,
                    ": q, k and v must have one batch, got ", q.size(0), " and ", t->size(0));
  }
}

inline void check_like(const char *op, const char *name, const Tensor &x, const Tensor &q) {
  bool same = x.dim() == q.dim() && x.scalar_type() == q.scalar_type();
  for (int64_t i = 0; same && i < q.dim(); ++i)
    same = x.size(i) == q.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and dtype of q");
}

// `rows` is the number of queries of all heads.
inline void check_lse(const char *op, const Tensor &lse, int64_t rows) {
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == rows &&
                      lse.is_contiguous(),
                  op, ": lse must be the contiguous float32 tensor that forward returned");
}

inline const int32_t *lengths(const char *op, const char *name, const Tensor &x, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 1 && x.size(0) == count &&
                      x.is_contiguous(),
                  op, ": ", name, " must be a contiguous int32 tensor of ", count, " elements");
  return static_cast<const int32_t *>(x.const_data_ptr());
}

inline void check_packed(const char *op, const Tensor &qkv, int dims) {
  STD_TORCH_CHECK(qkv.dim() == dims && qkv.size(dims - 3) == 3, op, ": qkv must have ", dims,
                  " dimensions, (", dims == 5 ? "B, " : "", "tokens, 3, H, D)");
}

} // namespace fastformer
