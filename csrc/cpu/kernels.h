// The CPU kernels as plain functions on pointers: one table per instruction set, no torch header.
//
// Every op's source is compiled once per instruction set, with FASTFORMER_ISA naming the namespace
// its kernels go to. Such a source keeps its helpers in an anonymous namespace and uses no STL: the
// linker would keep one copy of an inline function for all of them, perhaps the AVX-512 one.
#pragma once
#include "cpu/adamw.h"
#include "cpu/attention.h"
#include "cpu/dropout.h"
#include "cpu/embedding.h"
#include "cpu/gemm.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/mlp.h"

namespace fastformer::cpu {

struct Kernels {
  const char *isa;
  const DropoutKernels *dropout;
  const EmbeddingKernels *embedding;
  const GemmKernels *gemm;
  const LayerNormKernels *layer_norm;
  const LinearKernels *linear;
  const MlpKernels *mlp;
  const LinearCrossEntropyKernels *linear_cross_entropy;
  const AttentionForwardKernels *attention_fwd;
  const AttentionBackwardKernels *attention_bwd;
  const AdamwKernels *adamw;
};

// The table for this machine's best instruction set, or the one FASTFORMER_CPU_ISA names. Null when
// the variable names none that this machine can run; `*error` is then the reason.
const Kernels *select_kernels(const char **error);

} // namespace fastformer::cpu
