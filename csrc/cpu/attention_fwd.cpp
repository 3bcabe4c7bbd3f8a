#include "cpu/attention.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

extern const AttentionForwardKernels attention_fwd_kernels;
const AttentionForwardKernels attention_fwd_kernels = {};

} // namespace fastformer::cpu::FASTFORMER_ISA
