// The CPU kernels as plain functions on pointers: one table per instruction set, no torch header.
//
// Every op's source is compiled once per instruction set, with FASTFORMER_ISA naming the namespace
// its kernels go to. Such a source keeps its helpers in an anonymous namespace and uses no STL: the
// linker would keep one copy of an inline function for all of them, perhaps the AVX-512 one.
#pragma once
#include <cstdint>

namespace fastformer::cpu {

struct Kernels {
  const char *isa;
  // Fills the draws [begin, end) of a (rows, cols) mask, counted row by row, ceil(cols / 8) in a
  // row; each draw makes eight neighbouring elements. `stream` is offset + site.
  void (*dropout_mask)(bool *keep, int64_t begin, int64_t end, int64_t cols, uint64_t seed,
                       uint64_t stream, uint32_t threshold);
};

// The table for this machine's best instruction set, or the one FASTFORMER_CPU_ISA names. Null when
// the variable names none that this machine can run; `*error` is then the reason.
const Kernels *select_kernels(const char **error);

} // namespace fastformer::cpu
