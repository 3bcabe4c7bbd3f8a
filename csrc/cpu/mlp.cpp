#include "cpu/mlp.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

extern const MlpKernels mlp_kernels;
const MlpKernels mlp_kernels = {};

} // namespace fastformer::cpu::FASTFORMER_ISA
