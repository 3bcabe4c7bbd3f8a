#include "cpu/layer_norm.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels = {};

} // namespace fastformer::cpu::FASTFORMER_ISA
