#include "cpu/linear.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {};

} // namespace fastformer::cpu::FASTFORMER_ISA
