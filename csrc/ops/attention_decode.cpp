// Attention from few queries on the GPU: the checks and the memory around its kernels.
#include "ops/attention_decode.h"

#ifdef FASTFORMER_WITH_CUDA
#include "cuda/attention_decode.h"

namespace fastformer {
namespace {

void check_operands(const char *op, const Tensor &q, const Tensor &k, const Tensor &v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op,
                  ": q, k and v must have 4 dimensions, got ", q.dim(), ", ", k.dim(), " and ",
                  v.dim());
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half) &&
          k.scalar_type() == type && v.scalar_type() == type,
      op, ": q, k and v must all be float32, all bfloat16 or all float16, got ", type, ", ",
      k.scalar_type(), " and ", v.scalar_type());
  for (const Tensor *t : {&k, &v}) {
    STD_TORCH_CHECK(t->size(0) == q.size(0) && t->size(1) == k.size(1) && t->size(2) == q.size(2) &&
                        t->size(3) == q.size(3),
                    op, ": q, k and v must agree in batch, heads and head_dim, k and v in tokens");
    STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == q.get_device_index(), op,
                    ": q, k and v must be on one device");
  }
  const int64_t B = q.size(0), T = q.size(1), S = k.size(1), H = q.size(2), D = q.size(3);
  STD_TORCH_CHECK(D > 0 && D % kDecodeCols == 0 && D <= 128, op,
                  ": head_dim must be a multiple of 8 and at most 128, got ", D);
  STD_TORCH_CHECK(T <= kDecodeMaxQueries, op, ": this kernel takes at most ", kDecodeMaxQueries,
                  " queries, got ", T);
  STD_TORCH_CHECK(S <= kDecodeMaxKeys, op, ": this kernel takes at most ", kDecodeMaxKeys,
                  " keys, got ", S);
  const int64_t blocks = decode_launch(B, T, S, H, D).blocks;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, op,
                  ": B * T * H is too large for one launch, got B=", B, ", T=", T, ", H=", H);
}

// The kernel reads 16 bytes at a time.
bool is_readable(const Tensor &x) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  bool readable = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(3) == 1;
  for (int64_t i = 0; i < 3; ++i)
    readable = readable && (x.size(i) <= 1 || x.stride(i) * bytes % 16 == 0);
  return readable;
}

Tensor readable(const Tensor &x) {
  const Tensor y = is_readable(x) ? x : torch::stable::contiguous(x);
  return is_readable(y) ? y : torch::stable::clone(y);
}

fastformer_strides strides(const Tensor &x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

} // namespace

std::tuple<Tensor, Tensor> decode_fwd(const char *op, const Tensor &q, const Tensor &k,
                                      const Tensor &v, const std::optional<Tensor> &key_lengths,
                                      bool causal, double scale) {
  const CudaLaunch launch(op, q);
  check_operands(op, q, k, v);
  fastformer_attention_decode_args a{};
  a.B = q.size(0);
  a.T = q.size(1);
  a.S = k.size(1);
  a.H = q.size(2);
  a.D = q.size(3);
  if (key_lengths) {
    STD_TORCH_CHECK(key_lengths->scalar_type() == ScalarType::Int && key_lengths->dim() == 1 &&
                        key_lengths->size(0) == a.B && key_lengths->is_contiguous() &&
                        key_lengths->is_cuda() &&
                        key_lengths->get_device_index() == q.get_device_index(),
                    op, ": key_lengths must be a contiguous int32 tensor of ", a.B,
                    " elements on the device of q");
    a.key_lengths = static_cast<const int32_t *>(key_lengths->const_data_ptr());
  }
  const Tensor queries = readable(q), keys = readable(k), values = readable(v);
  const auto floats = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, q.device());
  };
  Tensor out = torch::stable::empty(q.sizes(), q.scalar_type(), std::nullopt, q.device());
  Tensor lse = floats({a.B, a.H, a.T});
  Tensor scratch =
      floats({decode_scratch(decode_launch(a.B, a.T, a.S, a.H, a.D), a.B * a.T * a.H, a.D)});
  a.q = queries.const_data_ptr();
  a.k = keys.const_data_ptr();
  a.v = values.const_data_ptr();
  a.of_q = strides(queries);
  a.of_k = strides(keys);
  a.of_v = strides(values);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float *>(lse.mutable_data_ptr());
  a.scratch = static_cast<float *>(scratch.mutable_data_ptr());
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  a.type = q.scalar_type() == ScalarType::Float      ? FASTFORMER_FLOAT32
           : q.scalar_type() == ScalarType::BFloat16 ? FASTFORMER_BFLOAT16
                                                     : FASTFORMER_FLOAT16;
  launch.check(fastformer_attention_decode(&a, launch.stream()), q, k);
  return {out, lse};
}

} // namespace fastformer
#endif
