// Bindings of the attention ops on the GPU.
#include "ops/attention.h"

#ifdef FASTFORMER_WITH_CUDA
#include "cuda/attention_decode.h"
#include "ops/attention_decode.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace fastformer {
namespace {

using Args = fastformer_attention_args;
using Forward = std::tuple<Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2; // the kernels count in int

bool is_aligned(const Tensor &x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// `x` as it is where the kernels can read it, in pieces of 16 bytes, else a copy.
Tensor readable(const Tensor &x) {
  bool as_it_is = x.stride(x.dim() - 1) == 1 && x.stride(x.dim() - 3) <= kMost && is_aligned(x);
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    as_it_is = as_it_is && (x.stride(i) % 8 == 0 || x.size(i) <= 1);
  if (as_it_is)
    return x;
  const Tensor whole = torch::stable::contiguous(x);
  return is_aligned(whole) ? whole : torch::stable::clone(whole);
}

fastformer_attention_rows rows_at(void *data, const Tensor &x) {
  const int64_t first = x.dim() - 3;
  return {data, first > 0 ? x.stride(0) : 0, x.stride(first), x.stride(first + 1)};
}

fastformer_attention_rows read_rows(const Tensor &x) {
  return rows_at(const_cast<void *>(x.const_data_ptr()), x);
}

fastformer_attention_rows written_rows(Tensor x) { return rows_at(x.mutable_data_ptr(), x); }

void check_device(const char *op, const char *name, const Tensor &x, const Tensor &q) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), op, ": ", name,
                  " must be on the device of q");
}

struct Settings {
  bool causal;
  double scale, dropout_p;
  const std::optional<Tensor> &rng;
  int64_t site;
};

// Arguments of both layouts. The longest sequences have T queries and S keys.
Args settings_of(const char *op, const Tensor &q, const Tensor &k, const Tensor &v, int64_t T,
                 int64_t S, const Settings &s) {
  check_device(op, "k", k, q);
  check_device(op, "v", v, q);
  STD_TORCH_CHECK(T <= kMost && S <= kMost, op, ": sequences must have at most ", kMost,
                  " tokens, got T=", T, " and S=", S);
  STD_TORCH_CHECK(3 * q.size(q.dim() - 2) * q.size(q.dim() - 1) <= kMost, op,
                  ": H * head_dim must be at most ", kMost / 3, ", got H=", q.size(q.dim() - 2));
  Args a{};
  a.H = q.size(q.dim() - 2);
  a.D = static_cast<int32_t>(q.size(q.dim() - 1));
  a.T = static_cast<int32_t>(T);
  a.S = static_cast<int32_t>(S);
  a.type = dtype_index(op, "q", q.scalar_type());
  a.causal = s.causal;
  a.scale = static_cast<float>(s.scale);
  a.dropout.scale = 1.0f;
  if (s.rng.has_value())
    check_device(op, "rng", *s.rng, q);
  set_dropout(op, a.dropout, s.dropout_p, s.rng, s.site);
  return a;
}

Args padded(const char *op, const Tensor &q, const Tensor &k, const Tensor &v,
            const std::optional<Tensor> &key_lengths, const Settings &s) {
  check_operands(op, q, k, v, 4, ScalarType::Half);
  Args a = settings_of(op, q, k, v, q.size(1), k.size(1), s);
  a.B = q.size(0);
  if (key_lengths.has_value()) {
    check_device(op, "key_lengths", *key_lengths, q);
    a.key_lengths = lengths(op, "key_lengths", *key_lengths, a.B);
  }
  return a;
}

Args packed(const char *op, const Tensor &q, const Tensor &k, const Tensor &v,
            const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k, int64_t max_seqlen_q,
            int64_t max_seqlen_k, const Settings &s) {
  check_operands(op, q, k, v, 3, ScalarType::Half);
  STD_TORCH_CHECK(cu_seqlens_q.numel() >= 1, op, ": cu_seqlens_q must not be empty");
  check_device(op, "cu_seqlens_q", cu_seqlens_q, q);
  check_device(op, "cu_seqlens_k", cu_seqlens_k, q);
  const auto at_most = [](int64_t length, const Tensor &tokens) {
    return std::max<int64_t>(std::min(length, tokens.size(0)), 0);
  };
  Args a = settings_of(op, q, k, v, at_most(max_seqlen_q, q), at_most(max_seqlen_k, k), s);
  a.B = cu_seqlens_q.numel() - 1;
  a.N = q.size(0);
  a.cu_seqlens_q = lengths(op, "cu_seqlens_q", cu_seqlens_q, a.B + 1);
  a.cu_seqlens_k = lengths(op, "cu_seqlens_k", cu_seqlens_k, a.B + 1);
  return a;
}

Forward forward(Args a, const char *op, const Tensor &q, const Tensor &k, const Tensor &v) {
  const CudaLaunch launch(op, q);
  Tensor out = like(q, q.sizes(), q.scalar_type());
  Tensor lse = q.dim() == 4 ? like(q, {a.B, a.H, q.size(1)}, ScalarType::Float)
                            : like(q, {a.H, a.N}, ScalarType::Float);
  const Tensor q_in = readable(q), k_in = readable(k), v_in = readable(v);
  a.q = read_rows(q_in);
  a.k = read_rows(k_in);
  a.v = read_rows(v_in);
  a.out = written_rows(out);
  a.lse = static_cast<float *>(lse.mutable_data_ptr());
  launch.check(fastformer_attention_fwd(&a, launch.stream()), q, k);
  return {out, lse};
}

void backward(Args a, const char *op, const Tensor &grad_out, const Tensor &q, const Tensor &k,
              const Tensor &v, const Tensor &out, const Tensor &lse, const Tensor &grad_q,
              const Tensor &grad_k, const Tensor &grad_v) {
  check_like(op, "grad_out", grad_out, q);
  check_like(op, "out", out, q);
  check_lse(op, lse, a.H * (q.dim() == 4 ? a.B * a.T : a.N));
  check_device(op, "grad_out", grad_out, q);
  check_device(op, "out", out, q);
  check_device(op, "lse", lse, q);
  const CudaLaunch launch(op, q);
  const Tensor q_in = readable(q), k_in = readable(k), v_in = readable(v);
  const Tensor grad_in = readable(grad_out), out_in = readable(out);
  Tensor sums =
      like(q, {fastformer_attention_bwd_sums(a.B * a.H, a.T, a.S, a.D)}, ScalarType::Float);
  a.q = read_rows(q_in);
  a.k = read_rows(k_in);
  a.v = read_rows(v_in);
  a.out = read_rows(out_in);
  a.grad_out = read_rows(grad_in);
  a.grad_q = written_rows(grad_q);
  a.grad_k = written_rows(grad_k);
  a.grad_v = written_rows(grad_v);
  a.lse = static_cast<float *>(const_cast<void *>(lse.const_data_ptr()));
  a.sums = static_cast<float *>(sums.mutable_data_ptr());
  launch.check(fastformer_attention_bwd(&a, launch.stream()), q, k);
}

Backward three_gradients(const Args &a, const char *op, const Tensor &grad_out, const Tensor &q,
                         const Tensor &k, const Tensor &v, const Tensor &out, const Tensor &lse) {
  const Tensor grad_q = like(q, q.sizes(), q.scalar_type());
  const Tensor grad_k = like(q, k.sizes(), q.scalar_type());
  const Tensor grad_v = like(q, v.sizes(), q.scalar_type());
  backward(a, op, grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v);
  return {grad_q, grad_k, grad_v};
}

// Gradients of views of one packed projection (..., 3, H, D), written into one tensor of its shape.
Tensor packed_gradient(const Args &a, const char *op, const Tensor &grad_out, const Tensor &q,
                       const Tensor &k, const Tensor &v, const Tensor &out, const Tensor &lse,
                       const Tensor &qkv) {
  const Tensor grad = like(qkv, qkv.sizes(), qkv.scalar_type());
  const int64_t at = grad.dim() - 3;
  backward(a, op, grad_out, q, k, v, out, lse, torch::stable::select(grad, at, 0),
           torch::stable::select(grad, at, 1), torch::stable::select(grad, at, 2));
  return grad;
}

Forward attention_fwd(const Tensor &q, const Tensor &k, const Tensor &v,
                      const std::optional<Tensor> &key_lengths, bool causal, double scale,
                      double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "attention_fwd";
  if (q.dim() == 4 && q.size(1) <= kDecodeMaxQueries && !rng.has_value())
    return decode_fwd(op, q, k, v, key_lengths, causal, scale);
  const Settings settings{causal, scale, dropout_p, rng, site};
  return forward(padded(op, q, k, v, key_lengths, settings), op, q, k, v);
}

Backward attention_bwd(const Tensor &grad_out, const Tensor &q, const Tensor &k, const Tensor &v,
                       const Tensor &out, const Tensor &lse,
                       const std::optional<Tensor> &key_lengths, bool causal, double scale,
                       double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "attention_bwd";
  const Settings settings{causal, scale, dropout_p, rng, site};
  return three_gradients(padded(op, q, k, v, key_lengths, settings), op, grad_out, q, k, v, out,
                         lse);
}

Tensor attention_qkvpacked_bwd(const Tensor &grad_out, const Tensor &qkv, const Tensor &out,
                               const Tensor &lse, const std::optional<Tensor> &key_lengths,
                               bool causal, double scale, double dropout_p,
                               const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "attention_qkvpacked_bwd";
  check_packed(op, qkv, 5);
  const Tensor q = torch::stable::select(qkv, 2, 0), k = torch::stable::select(qkv, 2, 1),
               v = torch::stable::select(qkv, 2, 2);
  const Settings settings{causal, scale, dropout_p, rng, site};
  return packed_gradient(padded(op, q, k, v, key_lengths, settings), op, grad_out, q, k, v, out,
                         lse, qkv);
}

Forward attention_varlen_fwd(const Tensor &q, const Tensor &k, const Tensor &v,
                             const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k,
                             int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale,
                             double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "attention_varlen_fwd";
  const Settings settings{causal, scale, dropout_p, rng, site};
  const Args a =
      packed(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, settings);
  return forward(a, op, q, k, v);
}

Backward attention_varlen_bwd(const Tensor &grad_out, const Tensor &q, const Tensor &k,
                              const Tensor &v, const Tensor &out, const Tensor &lse,
                              const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k,
                              int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale,
                              double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "attention_varlen_bwd";
  const Settings settings{causal, scale, dropout_p, rng, site};
  const Args a =
      packed(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, settings);
  return three_gradients(a, op, grad_out, q, k, v, out, lse);
}

Tensor attention_varlen_qkvpacked_bwd(const Tensor &grad_out, const Tensor &qkv, const Tensor &out,
                                      const Tensor &lse, const Tensor &cu_seqlens,
                                      int64_t max_seqlen, bool causal, double scale,
                                      double dropout_p, const std::optional<Tensor> &rng,
                                      int64_t site) {
  const char *op = "attention_varlen_qkvpacked_bwd";
  check_packed(op, qkv, 4);
  const Tensor q = torch::stable::select(qkv, 1, 0), k = torch::stable::select(qkv, 1, 1),
               v = torch::stable::select(qkv, 1, 2);
  const Settings settings{causal, scale, dropout_p, rng, site};
  const Args a = packed(op, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, settings);
  return packed_gradient(a, op, grad_out, q, k, v, out, lse, qkv);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CUDA, m) {
  m.impl("attention_fwd.cuda", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd.cuda", TORCH_BOX(&attention_bwd));
  m.impl("attention_qkvpacked_bwd.cuda", TORCH_BOX(&attention_qkvpacked_bwd));
  m.impl("attention_varlen_fwd.cuda", TORCH_BOX(&attention_varlen_fwd));
  m.impl("attention_varlen_bwd.cuda", TORCH_BOX(&attention_varlen_bwd));
  m.impl("attention_varlen_qkvpacked_bwd.cuda", TORCH_BOX(&attention_varlen_qkvpacked_bwd));
}

} // namespace fastformer
#endif
