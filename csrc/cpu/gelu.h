// GELU and its derivative, in the erf and the tanh form, on vectors.
//
// With a = |x|, gelu(x) = max(x, 0) - a q(a), where q(a) is the share of x that is lost: Phi(-a),
// or the sigmoid of -u(a) in the tanh form. It dies out as exp(-a^2 / 2) does, so infinities and
// large numbers need no care of their own, and nothing cancels where 1 + erf(x) would.
//
// T is the type in memory, which sets the precision: for float the fits err by 1e-7 at most, for
// bf16 by 1e-4, a twentieth of its rounding. NaN comes through, since `min` and `max` give their
// second operand where one is NaN.
#pragma once
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

template <class T> constexpr int kExp2Degree = sizeof(T) == 4 ? 5 : 3;

// |x|, at most 13: q is below 1e-37 there.
FASTFORMER_INLINE Vec gelu_size(Vec x) {
  return min(splat(13.0f), bits<Vec>(bits<IntVec>(x) & 0x7fffffff));
}

// u = kTanhSlope a (1 + kTanhCubic a^2) is twice the argument of tanh.
constexpr float kTanhSlope = 1.59576912f, kTanhCubic = 0.044715f;

template <class T> FASTFORMER_INLINE Vec tanh_tail(Vec a, Vec a2) {
  constexpr float kBase2 = -kTanhSlope * kLog2e;
  const Vec e = exp2<kExp2Degree<T>>(a * fma(a2, splat(kBase2 * kTanhCubic), splat(kBase2)));
  return divide<T>(e, 1.0f + e);
}

template <class T, bool kTanh> FASTFORMER_INLINE Vec gelu(Vec x) {
  const Vec a = gelu_size(x);
  if constexpr (kTanh) {
    return max(zero(), x) - a * tanh_tail<T>(a, a * a);
  } else {
    // Phi(-a) as a power of a polynomial: with no exponential it takes half the time of what
    // gelu_and_slope does. Absolute errors of a Phi(-a) are 6e-8 with the 8th power, 2e-6 with the
    // 16th.
    static const float p32[] = {1.09050775f,     0.108761288f,     0.0488255583f,
                                0.00941479951f,  0.00101025228f,   0.000162761033f,
                                9.05915294e-05f, -1.51488457e-05f, 2.95243967e-06f};
    static const float p16[] = {1.0442735f,     0.0520873107f,    0.0220064539f,
                                0.00356169138f, -7.66432568e-05f, 9.37322693e-05f};
    const Vec p = sizeof(T) == 4 ? polynomial(a, p32) : polynomial(a, p16);
    const Vec p2 = p * p, p4 = p2 * p2, p8 = p4 * p4;
    return max(zero(), x) - divide<T>(a, sizeof(T) == 4 ? p8 : p8 * p8);
  }
}

struct GeluAndSlope {
  Vec value, slope;
};

template <class T, bool kTanh> FASTFORMER_INLINE GeluAndSlope gelu_and_slope(Vec x) {
  const Vec a = gelu_size(x), a2 = a * a;
  Vec q, slope; // the slope at -a; that at a is what it lacks of 1
  if constexpr (kTanh) {
    q = tanh_tail<T>(a, a2);
    const Vec u_slope = fma(a2, splat(3.0f * kTanhSlope * kTanhCubic), splat(kTanhSlope));
    slope = q - a * u_slope * (q - q * q);
  } else {
    // The normal density and, as a rational function, what to multiply it by for Phi(-a).
    static const float p32[] = {0.499999970f, 0.347837090f, 0.111263312f, 0.0150516657f};
    static const float q32[] = {1.0f, 1.49355507f, 0.914251924f, 0.278587699f, 0.0377373882f};
    static const float p16[] = {0.49993762f, 0.12758632f, 0.00086428f};
    static const float q16[] = {1.0f, 1.04963947f, 0.35314035f};
    const Vec e = exp2<kExp2Degree<T>>(a2 * (-0.5f * kLog2e));
    const Vec ratio = sizeof(T) == 4 ? divide<T>(polynomial(a, p32), polynomial(a, q32))
                                     : divide<T>(polynomial(a, p16), polynomial(a, q16));
    q = e * ratio;
    slope = e * fma(a, splat(-0.398942280f), ratio); // 1 / sqrt(2 pi)
  }
  return {max(zero(), x) - a * q, x < 0.0f ? slope : 1.0f - slope};
}

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
