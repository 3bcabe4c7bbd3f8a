// New tensors for the results of CPU ops, in blocks that are kept and used again.
//
// The C library returns large blocks to the system when they are freed and asks for them again in
// the next training step; the page faults of that cost a step several percent. So blocks from
// 256 KiB on are kept here when their tensor dies, as PyTorch keeps those of a GPU, and hold at
// most what was once in use. FASTFORMER_CPU_CACHE=0 turns this off; fastformer.release_memory()
// returns what is idle.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace fastformer {

// An uninitialised contiguous tensor on the CPU.
torch::stable::Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                 torch::headeronly::ScalarType dtype);

// Frees all idle blocks and returns their size in bytes.
int64_t release_memory();

} // namespace fastformer
