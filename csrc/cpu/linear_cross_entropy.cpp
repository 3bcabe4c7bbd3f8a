#include "cpu/linear_cross_entropy.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

extern const LinearCrossEntropyKernels linear_cross_entropy_kernels;
const LinearCrossEntropyKernels linear_cross_entropy_kernels = {};

} // namespace fastformer::cpu::FASTFORMER_ISA
