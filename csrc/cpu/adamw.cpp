#include "cpu/adamw.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {

extern const AdamwKernels adamw_kernels;
const AdamwKernels adamw_kernels = {};

} // namespace fastformer::cpu::FASTFORMER_ISA
