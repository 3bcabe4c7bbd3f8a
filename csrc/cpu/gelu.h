// GELU and its derivative, in the erf and the tanh form, on vectors.
//
// With a = |x|, gelu(x) = max(x, 0) - a q(a), where q(a) is the share of x that is lost: Phi(-a) or
// the tanh form's sigmoid(-u(a)). q is a product with exp(...), so that both tails keep their
// relative precision, where 1 + erf(x) cancels; and value and derivative share all of it.
#pragma once
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

// Precision follows the type in memory: the fits for bfloat16 err by 2e-6.
template <class T> constexpr int kExp2Degree = sizeof(T) == 4 ? 5 : 4;

struct GeluTail {
  Vec a;     // |x|
  Vec q;     // gelu(x) = max(x, 0) - a q
  Vec slope; // gelu'(x) for x < 0; for x > 0 it is 1 - slope
};

template <class T, bool kTanh> FASTFORMER_INLINE GeluTail gelu_tail(Vec x) {
  // Beyond 13, q is below 1e-37. `min` gives its second operand where one is NaN, so NaN stays.
  const Vec a = min(splat(13.0f), bits<Vec>(bits<IntVec>(x) & 0x7fffffff));
  const Vec a2 = a * a;
  if constexpr (kTanh) {
    constexpr float kSlope = 1.5957691216f, kCubic = 0.044715f; // 2 sqrt(2 / pi)
    const Vec minus_u =
        a * fma(a2, splat(-kSlope * kCubic * kLog2e), splat(-kSlope * kLog2e)); // base 2
    const Vec e = exp2<kExp2Degree<T>>(minus_u), r = reciprocal(1.0f + e), q = e * r;
    const Vec u_slope = fma(a2, splat(3.0f * kSlope * kCubic), splat(kSlope));
    return {a, q, q * (1.0f - a * u_slope * r)};
  } else {
    // Phi(-a) / exp(-a^2 / 2) as a rational minimax fit: errs by 3e-8 and 2e-6 times
    // exp(-a^2 / 2), relatively by 1e-6 and 6e-5 in the tail.
    static const float p32[] = {0.499999970f, 0.347837090f, 0.111263312f, 0.0150516657f};
    static const float q32[] = {1.0f, 1.49355507f, 0.914251924f, 0.278587699f, 0.0377373882f};
    static const float p16[] = {0.500001788f, 0.261335373f, 0.0550062209f};
    static const float q16[] = {1.0f, 1.32072592f, 0.662561595f, 0.137582883f};
    const Vec e = exp2<kExp2Degree<T>>(a2 * (-0.5f * kLog2e));
    const Vec ratio = sizeof(T) == 4 ? polynomial(a, p32) * reciprocal(polynomial(a, q32))
                                     : polynomial(a, p16) * reciprocal(polynomial(a, q16));
    return {a, e * ratio, e * fma(a, splat(-0.398942280f), ratio)}; // 1 / sqrt(2 pi)
  }
}

FASTFORMER_INLINE Vec gelu(Vec x, const GeluTail &tail) {
  return max(zero(), x) - tail.a * tail.q; // max, too, lets NaN through
}

FASTFORMER_INLINE Vec gelu_slope(Vec x, const GeluTail &tail) {
  return x < 0.0f ? tail.slope : 1.0f - tail.slope;
}

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
