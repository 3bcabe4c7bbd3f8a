#include "cpu/attention.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

extern const AttentionBackwardKernels attention_bwd_kernels;
const AttentionBackwardKernels attention_bwd_kernels = {};

} // namespace fastformer::cpu::FASTFORMER_ISA
