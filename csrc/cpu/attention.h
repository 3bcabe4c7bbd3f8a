#pragma once
#include "cpu/bf16.h"
#include "cpu/dropout.h"

#include <cstdint>

namespace fastformer::cpu {

struct AttentionForwardKernels {};
struct AttentionBackwardKernels {};

} // namespace fastformer::cpu
