// Softmax cross-entropy of one row of logits at a time. A row of any real vocabulary stays in the
// second-level cache between the passes over it: the largest logit, the sum of exponentials, and
// the gradient.
#include "cpu/linear_cross_entropy.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int kUnroll = 4; // chains of dependent instructions that run side by side

// Calls step(col, chain) for whole vectors and last(col, n) for the n < kLanes elements after them.
template <class Step, class Last>
FASTFORMER_INLINE void for_each_vec(int64_t cols, Step step, Last last) {
  int64_t col = 0;
  for (; col + kUnroll * kLanes <= cols; col += kUnroll * kLanes)
#pragma GCC unroll 4
    for (int chain = 0; chain < kUnroll; ++chain)
      step(col + chain * kLanes, chain);
  for (; col + kLanes <= cols; col += kLanes)
    step(col, 0);
  if (col < cols)
    last(col, cols - col);
}

template <class T> struct Logits {
  const T *row;
  const float *bias;

  FASTFORMER_INLINE Vec at(int64_t col) const {
    const Vec x = load(row + col);
    return bias ? x + load(bias + col) : x;
  }
  FASTFORMER_INLINE Vec at(int64_t col, int64_t n) const {
    const Vec x = load(row + col, n);
    return bias ? x + load(bias + col, n) : x;
  }
  float scalar(int64_t col) const { return to_float(row[col]) + (bias ? bias[col] : 0.0f); }
};

FASTFORMER_INLINE IntVec first_lanes(int64_t n) { return lane_numbers() < static_cast<int32_t>(n); }

template <class T> float largest_logit(const Logits<T> &logits, int64_t cols) {
  Vec found[kUnroll];
  for (Vec &v : found)
    v = splat(-__builtin_inff());
  for_each_vec(
      cols, [&](int64_t col, int chain) { found[chain] = max(found[chain], logits.at(col)); },
      [&](int64_t col, int64_t n) {
        const Vec x = logits.at(col, n);
        found[1] = max(found[1], first_lanes(n) ? x : found[1]);
      });
  return largest(max(max(found[0], found[1]), max(found[2], found[3])));
}

template <class T> float sum_of_logits(const Logits<T> &logits, int64_t cols) {
  Vec sums[kUnroll] = {};
  for_each_vec(
      cols, [&](int64_t col, int chain) { sums[chain] += logits.at(col); },
      [&](int64_t col, int64_t n) { sums[1] += logits.at(col, n); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// exp(x - shift). A logit of minus infinity, which forbids a token, has the weight of one far
// below: infinity would be NaN in the exponential. The order of `max` lets NaN pass.
struct Exponential {
  explicit Exponential(float shift_) : shift(splat(shift_)) {}
  FASTFORMER_INLINE Vec operator()(Vec x) const { return exp(max(splat(-100.0f), x - shift)); }
  Vec shift;
};

// The same for results that are rounded to bfloat16.
struct CoarseExponential {
  explicit CoarseExponential(float shift) : shift2(splat(-shift * kLog2e)) {}
  FASTFORMER_INLINE Vec operator()(Vec x) const {
    return exp2<4>(max(splat(-144.0f), fma(x, splat(kLog2e), shift2)));
  }
  Vec shift2;
};

// `kStore` keeps the exponentials in place of the logits.
template <bool kStore, class T, class Exp>
float sum_of_exponentials(T *row, const Logits<T> &logits, const Exp &exponential, int64_t cols) {
  Vec sums[kUnroll] = {};
  for_each_vec(
      cols,
      [&](int64_t col, int chain) {
        const Vec e = exponential(logits.at(col));
        if (kStore)
          store(row + col, e);
        sums[chain] += e;
      },
      [&](int64_t col, int64_t n) {
        const Vec e = keep_where(first_lanes(n), exponential(logits.at(col, n)));
        if (kStore)
          store(row + col, e, n);
        sums[1] += e;
      });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct StoredExponentials {
  const float *row;
  FASTFORMER_INLINE Vec at(int64_t col) const { return load(row + col); }
  FASTFORMER_INLINE Vec at(int64_t col, int64_t n) const { return load(row + col, n); }
};

struct NewExponentials {
  Logits<bf16> logits;
  CoarseExponential exponential;
  FASTFORMER_INLINE Vec at(int64_t col) const { return exponential(logits.at(col)); }
  FASTFORMER_INLINE Vec at(int64_t col, int64_t n) const { return exponential(logits.at(col, n)); }
};

// row = exponentials * scale - offset, which is also added to `bias_sums` unless that is null.
template <class T, class Exponentials>
void write_gradient(T *row, const Exponentials &exponentials, float scale, float offset,
                    float *bias_sums, int64_t cols) {
  const Vec k = splat(scale), shift = splat(-offset);
  for_each_vec(
      cols,
      [&](int64_t col, int) {
        const Vec g = fma(exponentials.at(col), k, shift);
        store(row + col, g);
        if (bias_sums)
          store(bias_sums + col, load(bias_sums + col) + g);
      },
      [&](int64_t col, int64_t n) {
        const Vec g = fma(exponentials.at(col, n), k, shift);
        store(row + col, g, n);
        if (bias_sums)
          store(bias_sums + col, load(bias_sums + col, n) + g, n);
      });
}

// In float32 the exponentials take the place of the logits, and the third pass only scales them.
// bfloat16 would round them twice that way: there they are computed again from the logits.
template <class T, class Exp>
double one_row(T *row, int64_t target, const CrossEntropy &loss, float *bias_sums) {
  constexpr bool kIsFloat = sizeof(T) == sizeof(float);
  const int64_t V = loss.vocabulary;
  const Logits<T> logits{row, loss.bias};
  const double smoothing = loss.label_smoothing;
  const double mean = smoothing > 0.0 ? sum_of_logits(logits, V) / static_cast<double>(V) : 0.0;
  const double wanted = logits.scalar(target);
  const float top = largest_logit(logits, V);
  const float total = kIsFloat && loss.needs_grad
                          ? sum_of_exponentials<kIsFloat>(row, logits, Exp(top), V)
                          : sum_of_exponentials<false>(row, logits, Exp(top), V);
  const double lse = top + __builtin_log(static_cast<double>(total));
  if (loss.needs_grad) {
    const double slope = 1.0 + 2.0 * loss.z_loss * lse;
    const double offset = smoothing / static_cast<double>(V);
    const float scale = static_cast<float>(loss.share * slope);
    const float shift = static_cast<float>(loss.share * offset);
    if constexpr (kIsFloat)
      write_gradient(row, StoredExponentials{row}, scale / total, shift, bias_sums, V);
    else
      write_gradient(row, NewExponentials{logits, Exp(static_cast<float>(lse))}, scale, shift,
                     bias_sums, V);
    const double others = slope * __builtin_exp(wanted - lse) - offset;
    from_float(row + target, static_cast<float>(loss.share * (others - (1.0 - smoothing))));
    if (bias_sums)
      bias_sums[target] -= static_cast<float>(loss.share * (1.0 - smoothing));
  }
  return lse - (1.0 - smoothing) * wanted - smoothing * mean + loss.z_loss * lse * lse;
}

template <class T, class Exp>
void rows_of_logits(T *logits, const int64_t *targets, int64_t rows, const CrossEntropy &loss,
                    double *losses, float *bias_sums) {
  for (int64_t row = 0; row < rows; ++row)
    losses[row] = one_row<T, Exp>(logits + row * loss.vocabulary, targets[row], loss, bias_sums);
}

} // namespace

extern const LinearCrossEntropyKernels linear_cross_entropy_kernels;
const LinearCrossEntropyKernels linear_cross_entropy_kernels = {
    rows_of_logits<float, Exponential>, rows_of_logits<bf16, CoarseExponential>};

} // namespace fastformer::cpu::FASTFORMER_ISA
