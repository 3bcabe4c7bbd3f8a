// Chooses the table of kernels for this machine.
#include "cpu/kernels.h"

#include <cstdlib>
#include <string>

namespace fastformer::cpu {

#define FASTFORMER_KERNELS(ISA)                                                                    \
  namespace isa_##ISA {                                                                            \
    extern const DropoutKernels dropout_kernels;                                                   \
    extern const EmbeddingKernels embedding_kernels;                                               \
    extern const GemmKernels gemm_kernels;                                                         \
    extern const LayerNormKernels layer_norm_kernels;                                              \
    extern const LinearKernels linear_kernels;                                                     \
    extern const MlpKernels mlp_kernels;                                                           \
    extern const LinearCrossEntropyKernels linear_cross_entropy_kernels;                           \
    extern const AttentionForwardKernels attention_fwd_kernels;                                    \
    extern const AttentionBackwardKernels attention_bwd_kernels;                                   \
    extern const AdamwKernels adamw_kernels;                                                       \
  }                                                                                                \
  static const Kernels kernels_##ISA = {#ISA,                                                      \
                                        &isa_##ISA::dropout_kernels,                               \
                                        &isa_##ISA::embedding_kernels,                             \
                                        &isa_##ISA::gemm_kernels,                                  \
                                        &isa_##ISA::layer_norm_kernels,                            \
                                        &isa_##ISA::linear_kernels,                                \
                                        &isa_##ISA::mlp_kernels,                                   \
                                        &isa_##ISA::linear_cross_entropy_kernels,                  \
                                        &isa_##ISA::attention_fwd_kernels,                         \
                                        &isa_##ISA::attention_bwd_kernels,                         \
                                        &isa_##ISA::adamw_kernels};

FASTFORMER_KERNELS(default)
#ifdef FASTFORMER_WITH_AVX2
FASTFORMER_KERNELS(avx2)
#endif
#ifdef FASTFORMER_WITH_AVX512
FASTFORMER_KERNELS(avx512)
#endif
#ifdef FASTFORMER_WITH_AVX512BF16
FASTFORMER_KERNELS(avx512bf16)
#endif

namespace {

struct Variant {
  const Kernels *kernels;
  bool runs_here;
};

std::string names(const Variant *begin, const Variant *end) {
  std::string joined;
  for (const Variant *v = begin; v != end; ++v)
    if (v->runs_here)
      joined += (joined.empty() ? "" : ", ") + std::string(v->kernels->isa);
  return joined;
}

} // namespace

const Kernels *select_kernels(const char **error) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") &&
                                     __builtin_cpu_supports("fma") &&
                                     __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  const Variant variants[] = {
#ifdef FASTFORMER_WITH_AVX512BF16
      {&kernels_avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
#ifdef FASTFORMER_WITH_AVX512
      {&kernels_avx512, avx512},
#endif
#ifdef FASTFORMER_WITH_AVX2
      {&kernels_avx2, avx2},
#endif
      {&kernels_default, true}};
  const char *requested = std::getenv("FASTFORMER_CPU_ISA");
  const bool any = requested == nullptr || *requested == '\0';
  for (const Variant &v : variants)
    if (v.runs_here && (any || std::string(requested) == v.kernels->isa))
      return v.kernels;
  static const std::string message =
      std::string("FASTFORMER_CPU_ISA=") + requested +
      " is not an instruction set that was compiled for and this machine can run; use one of " +
      names(std::begin(variants), std::end(variants)) + ", or leave it unset";
  *error = message.c_str();
  return nullptr;
}

} // namespace fastformer::cpu
