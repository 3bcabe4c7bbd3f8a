// bfloat16 in memory: the upper half of a float32.
#pragma once
#include <cstdint>

namespace fastformer::cpu {

struct bf16 {
  uint16_t bits;
};

} // namespace fastformer::cpu
