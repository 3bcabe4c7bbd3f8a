// Dropout masks on the CPU.
#include "cpu/dropout.h"
#include "cpu/philox_vec.h"

#include <cstring>

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

// `cols` elements of one row, from column 8 * col_group on.
void fill_row(uint8_t *out, int64_t cols, const Dropout &dropout, uint32_t row,
              uint32_t col_group) {
  int64_t col = 0;
  for (; col + kColsPerVec <= cols; col += kColsPerVec, col_group += kDraws)
    store_keep(out + col, dropout.seed, dropout.stream, row, col_group, dropout.threshold);
  if (col < cols) {
    uint8_t tail[kColsPerVec];
    store_keep(tail, dropout.seed, dropout.stream, row, col_group, dropout.threshold);
    std::memcpy(out + col, tail, static_cast<size_t>(cols - col));
  }
}

void dropout_mask(bool *keep, int64_t begin, int64_t end, int64_t cols, const Dropout &dropout) {
  uint8_t *out = reinterpret_cast<uint8_t *>(keep);
  const int64_t draws_per_row = (cols + kColsPerDraw - 1) / kColsPerDraw;
  while (begin < end) {
    const int64_t row = begin / draws_per_row, first = begin % draws_per_row;
    const bool to_row_end = end - begin >= draws_per_row - first;
    const int64_t last = to_row_end ? draws_per_row : first + (end - begin);
    const int64_t col = first * kColsPerDraw;
    const int64_t stop = to_row_end ? cols : last * kColsPerDraw;
    fill_row(out + row * cols + col, stop - col, dropout, static_cast<uint32_t>(row),
             static_cast<uint32_t>(first));
    begin += last - first;
  }
}

} // namespace

extern const DropoutKernels dropout_kernels;
const DropoutKernels dropout_kernels = {dropout_mask};

} // namespace fastformer::cpu::FASTFORMER_ISA
