// Bindings of the attention ops on the CPU.
#include "ops/attention.h"
#include "ops/memory.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <tuple>

namespace fastformer {
namespace {

using cpu::AttentionArgs;
using cpu::AttentionOperand;

// Memory of one thread, kept from call to call: a fresh block would be paid for in page faults.
void *workspace(size_t bytes) {
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, rounded));
    STD_TORCH_CHECK(memory != nullptr, "attention: out of memory for ", rounded, " bytes");
    size = rounded;
  }
  return memory.get();
}

// Threads take the next (sequence, head) when they are done with one, as lengths differ.
template <class Kernels> void run_tasks(const Kernels &kernels, const AttentionArgs &args) {
  const int64_t tasks = args.batch * args.H;
  const size_t bytes = kernels.workspace(args);
  const int64_t work = args.T * args.S * args.D;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(),
                                            tasks * std::max<int64_t>(work / 1024, 1) / 64 + 1);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin >= end)
      return;
    void *memory = workspace(bytes);
    for (int64_t task = next++; task < tasks; task = next++)
      kernels.run(args, task, memory);
  });
}

// (batch, tokens, H, D), or (tokens, H, D) without a batch stride.
template <class Pointer> AttentionOperand<Pointer> operand(const Tensor &x) {
  const int64_t first = x.dim() - 3;
  const int64_t batch = first > 0 ? x.stride(0) : 0;
  AttentionOperand<Pointer> o;
  if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>)
    o.data = x.const_data_ptr();
  else
    o.data = x.mutable_data_ptr();
  o.batch_stride = batch;
  o.token_stride = x.stride(first);
  o.head_stride = x.stride(first + 1);
  return o;
}

// The kernels read a head's elements side by side, and pairs of bfloat16 at once.
Tensor readable(const Tensor &x) {
  const int64_t D = x.size(x.dim() - 1);
  const bool unit = x.stride(x.dim() - 1) == 1 || D == 1;
  return unit && x.stride(x.dim() - 3) % 2 == 0 ? x : torch::stable::contiguous(x);
}

struct Settings {
  bool causal;
  double scale, dropout_p;
  const std::optional<Tensor> &rng;
  int64_t site;
};

AttentionArgs settings_of(const char *op, const Tensor &q, const Settings &s) {
  AttentionArgs args;
  args.H = q.size(q.dim() - 2);
  args.D = q.size(q.dim() - 1);
  args.bf16 = q.scalar_type() == ScalarType::BFloat16;
  args.causal = s.causal;
  args.scale = static_cast<float>(s.scale);
  args.dropout = cpu_dropout(op, s.dropout_p, s.rng, s.site);
  return args;
}

AttentionArgs padded(const char *op, const Tensor &q, const Tensor &k, const Tensor &v,
                     const std::optional<Tensor> &key_lengths, const Settings &s) {
  check_operands(op, q, k, v, 4, ScalarType::Float);
  AttentionArgs args = settings_of(op, q, s);
  args.batch = q.size(0);
  args.T = q.size(1);
  args.S = k.size(1);
  args.lse_batch_stride = args.H * args.T;
  args.lse_head_stride = args.T;
  if (key_lengths.has_value())
    args.key_lengths = lengths(op, "key_lengths", *key_lengths, args.batch);
  return args;
}

// The longest of the sequences; raises unless their ends ascend from 0 to `tokens`.
int64_t check_ends(const char *op, const char *name, const int32_t *ends, int64_t count,
                   int64_t tokens) {
  int64_t longest = 0;
  bool ascending = ends[0] == 0 && ends[count] == tokens;
  for (int64_t i = 0; i < count; ++i) {
    ascending = ascending && ends[i] <= ends[i + 1];
    longest = std::max<int64_t>(longest, ends[i + 1] - ends[i]);
  }
  STD_TORCH_CHECK(ascending, op, ": ", name, " must ascend from 0 to the number of tokens, ",
                  tokens, ", got ", ends[0], " to ", ends[count]);
  return longest;
}

AttentionArgs packed(const char *op, const Tensor &q, const Tensor &k, const Tensor &v,
                     const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k, const Settings &s) {
  check_operands(op, q, k, v, 3, ScalarType::Float);
  STD_TORCH_CHECK(cu_seqlens_q.numel() >= 1, op, ": cu_seqlens_q must not be empty");
  AttentionArgs args = settings_of(op, q, s);
  args.batch = cu_seqlens_q.numel() - 1;
  args.cu_seqlens_q = lengths(op, "cu_seqlens_q", cu_seqlens_q, args.batch + 1);
  args.cu_seqlens_k = lengths(op, "cu_seqlens_k", cu_seqlens_k, args.batch + 1);
  args.T = check_ends(op, "cu_seqlens_q", args.cu_seqlens_q, args.batch, q.size(0));
  args.S = check_ends(op, "cu_seqlens_k", args.cu_seqlens_k, args.batch, k.size(0));
  args.lse_head_stride = q.size(0);
  return args;
}

using Forward = std::tuple<Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

Forward forward(AttentionArgs args, const Tensor &q, const Tensor &k, const Tensor &v) {
  Tensor out = new_tensor(q.sizes(), q.scalar_type());
  Tensor lse = q.dim() == 4 ? new_tensor({args.batch, args.H, args.T}, ScalarType::Float)
                            : new_tensor({args.H, q.size(0)}, ScalarType::Float);
  const Tensor q_in = readable(q), k_in = readable(k), v_in = readable(v);
  args.q = operand<const void *>(q_in);
  args.k = operand<const void *>(k_in);
  args.v = operand<const void *>(v_in);
  args.out = operand<void *>(out);
  args.lse = static_cast<float *>(lse.mutable_data_ptr());
  run_tasks(*cpu_kernels().attention_fwd, args);
  return {out, lse};
}

void backward(AttentionArgs args, const char *op, const Tensor &grad_out, const Tensor &q,
              const Tensor &k, const Tensor &v, const Tensor &out, const Tensor &lse,
              AttentionOperand<void *> grad_q, AttentionOperand<void *> grad_k,
              AttentionOperand<void *> grad_v) {
  check_like(op, "grad_out", grad_out, q);
  check_like(op, "out", out, q);
  check_lse(op, lse, q.dim() == 4 ? args.batch * args.H * args.T : args.H * q.size(0));
  const Tensor q_in = readable(q), k_in = readable(k), v_in = readable(v);
  const Tensor grad_in = readable(grad_out), out_in = readable(out);
  args.q = operand<const void *>(q_in);
  args.k = operand<const void *>(k_in);
  args.v = operand<const void *>(v_in);
  args.grad = operand<const void *>(grad_in);
  args.saved_out = operand<const void *>(out_in);
  args.lse = static_cast<float *>(const_cast<void *>(lse.const_data_ptr()));
  args.grad_q = grad_q;
  args.grad_k = grad_k;
  args.grad_v = grad_v;
  run_tasks(*cpu_kernels().attention_bwd, args);
}

Backward three_gradients(const AttentionArgs &args, const char *op, const Tensor &grad_out,
                         const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &out,
                         const Tensor &lse) {
  Tensor grad_q = new_tensor(q.sizes(), q.scalar_type());
  Tensor grad_k = new_tensor(k.sizes(), q.scalar_type());
  Tensor grad_v = new_tensor(v.sizes(), q.scalar_type());
  backward(args, op, grad_out, q, k, v, out, lse, operand<void *>(grad_q), operand<void *>(grad_k),
           operand<void *>(grad_v));
  return {grad_q, grad_k, grad_v};
}

// Gradients of views of one packed projection (..., 3, H, D), written into one tensor of its shape.
Tensor packed_gradient(const AttentionArgs &args, const char *op, const Tensor &grad_out,
                       const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &out,
                       const Tensor &lse, const Tensor &qkv) {
  Tensor grad = new_tensor(qkv.sizes(), qkv.scalar_type());
  const int64_t at = grad.dim() - 3;
  backward(args, op, grad_out, q, k, v, out, lse,
           operand<void *>(torch::stable::select(grad, at, 0)),
           operand<void *>(torch::stable::select(grad, at, 1)),
           operand<void *>(torch::stable::select(grad, at, 2)));
  return grad;
}

Forward attention_fwd(const Tensor &q, const Tensor &k, const Tensor &v,
                      const std::optional<Tensor> &key_lengths, bool causal, double scale,
                      double dropout_p, const std::optional<Tensor> &rng, int64_t site) {
  const Settings settings{causal, scale, dropout_p, rng, site};
  return forward(padded("attention_fwd", q, k, v, key_lengths, settings), q, k, v);
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
                             const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k, int64_t,
                             int64_t, bool causal, double scale, double dropout_p,
                             const std::optional<Tensor> &rng, int64_t site) {
  const Settings settings{causal, scale, dropout_p, rng, site};
  return forward(packed("attention_varlen_fwd", q, k, v, cu_seqlens_q, cu_seqlens_k, settings), q,
                 k, v);
}

Backward attention_varlen_bwd(const Tensor &grad_out, const Tensor &q, const Tensor &k,
                              const Tensor &v, const Tensor &out, const Tensor &lse,
                              const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k, int64_t,
                              int64_t, bool causal, double scale, double dropout_p,
                              const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "attention_varlen_bwd";
  const Settings settings{causal, scale, dropout_p, rng, site};
  return three_gradients(packed(op, q, k, v, cu_seqlens_q, cu_seqlens_k, settings), op, grad_out, q,
                         k, v, out, lse);
}

Tensor attention_varlen_qkvpacked_bwd(const Tensor &grad_out, const Tensor &qkv, const Tensor &out,
                                      const Tensor &lse, const Tensor &cu_seqlens, int64_t,
                                      bool causal, double scale, double dropout_p,
                                      const std::optional<Tensor> &rng, int64_t site) {
  const char *op = "attention_varlen_qkvpacked_bwd";
  check_packed(op, qkv, 4);
  const Tensor q = torch::stable::select(qkv, 1, 0), k = torch::stable::select(qkv, 1, 1),
               v = torch::stable::select(qkv, 1, 2);
  const Settings settings{causal, scale, dropout_p, rng, site};
  return packed_gradient(packed(op, q, k, v, cu_seqlens, cu_seqlens, settings), op, grad_out, q, k,
                         v, out, lse, qkv);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("attention_fwd.cpu", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd.cpu", TORCH_BOX(&attention_bwd));
  m.impl("attention_qkvpacked_bwd.cpu", TORCH_BOX(&attention_qkvpacked_bwd));
  m.impl("attention_varlen_qkvpacked_bwd.cpu", TORCH_BOX(&attention_varlen_qkvpacked_bwd));
  m.impl("attention_varlen_fwd.cpu", TORCH_BOX(&attention_varlen_fwd));
  m.impl("attention_varlen_bwd.cpu", TORCH_BOX(&attention_varlen_bwd));
}

} // namespace fastformer
