// Bias and its gradient.
#include "cpu/linear.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

void add_bias(bf16 *out, const bf16 *bias, int64_t rows, int64_t cols) {
  const int64_t whole = cols / kLanes * kLanes, tail = cols - whole;
  for (int64_t row = 0; row < rows; ++row, out += cols) {
    for (int64_t col = 0; col < whole; col += kLanes)
      store(out + col, load(out + col) + load(bias + col));
    if (tail)
      store(out + whole, load(out + whole, tail) + load(bias + whole, tail), tail);
  }
}

// Row after row, as they lie in memory, the sums staying in cache; several at once, so that the
// sums are read and written less often than the matrix.
template <class T>
void column_sums(float *sums, const T *x, int64_t rows, int64_t cols, int64_t stride) {
  const int64_t whole = cols / kLanes * kLanes, tail = cols - whole;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4, x += 4 * stride) {
    const T *a = x, *b = a + stride, *c = b + stride, *d = c + stride;
    for (int64_t col = 0; col < whole; col += kLanes) {
      const Vec four = (load(a + col) + load(b + col)) + (load(c + col) + load(d + col));
      store(sums + col, load(sums + col) + four);
    }
    if (tail) {
      const Vec four = (load(a + whole, tail) + load(b + whole, tail)) +
                       (load(c + whole, tail) + load(d + whole, tail));
      store(sums + whole, load(sums + whole, tail) + four, tail);
    }
  }
  for (; row < rows; ++row, x += stride) {
    for (int64_t col = 0; col < whole; col += kLanes)
      store(sums + col, load(sums + col) + load(x + col));
    if (tail)
      store(sums + whole, load(sums + whole, tail) + load(x + whole, tail), tail);
  }
}

} // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {add_bias, column_sums<float>, column_sums<bf16>};

} // namespace fastformer::cpu::FASTFORMER_ISA
