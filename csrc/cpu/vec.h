// Vectors of floats in the width of each instruction set, and the functions the kernels need on
// them. GCC's vector extension gives the operators, on any machine; intrinsics are used where it
// has no word for what the hardware does in one instruction.
//
// Included by sources that are compiled once per instruction set: everything is in an anonymous
// namespace, and nothing of the standard library is used.
#pragma once
#include "cpu/bf16.h"

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

#define FASTFORMER_INLINE inline __attribute__((always_inline))

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes), aligned(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes), aligned(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes), aligned(2 * kLanes)));

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <class To, class From> FASTFORMER_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a value is read as another of its size");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

FASTFORMER_INLINE Vec splat(float x) { return x - Vec{}; }
FASTFORMER_INLINE Vec zero() { return Vec{}; }
FASTFORMER_INLINE IntVec lane_numbers() {
  IntVec v;
  for (int i = 0; i < kLanes; ++i)
    v[i] = i;
  return v;
}

// ---- arithmetic ----

FASTFORMER_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512BW__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

FASTFORMER_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512BW__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

FASTFORMER_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512BW__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// `v` as it is: a product that is subtracted from an equal one shall leave 0, not the rounding
// error that is left when the compiler fuses the second with the subtraction.
FASTFORMER_INLINE Vec unfused(Vec v) {
#if defined(__x86_64__)
  __asm__("" : "+x"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

// The lanes of `a` where `mask` has all bits set, zero where it has none.
FASTFORMER_INLINE Vec keep_where(IntVec mask, Vec a) { return bits<Vec>(bits<IntVec>(a) & mask); }

FASTFORMER_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512BW__)
  // 14 bits, and one step of Newton for the rest.
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  return r * (Vec)_mm512_fnmadd_ps((__m512)x, (__m512)r, _mm512_set1_ps(2.0f));
#else
  return 1.0f / x;
#endif
}

// a / b, to the 14 bits of the hardware's estimate where T is bfloat16.
template <class T> FASTFORMER_INLINE Vec divide(Vec a, Vec b) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2)
    return a * (Vec)_mm512_rcp14_ps((__m512)b);
#endif
  return a / b;
}

FASTFORMER_INLINE Vec sqrt(Vec x) {
#if defined(__AVX512BW__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i)
    x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

FASTFORMER_INLINE float sum(Vec v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0.0f;
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      v[i] += v[i + width];
  s = v[0];
  return s;
#endif
}

FASTFORMER_INLINE float largest(Vec v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i)
    m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// p[0] + p[1] x + ... by Horner's rule.
template <int N> FASTFORMER_INLINE Vec polynomial(Vec x, const float (&p)[N]) {
  Vec y = splat(p[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i)
    y = fma(y, x, splat(p[i]));
  return y;
}

// 2^x. Degree 5 errs by 8e-8, about float32's rounding; degree 4, by 3e-6, and degree 3, by 7e-5,
// serve values that are rounded to bfloat16. From 2^-126 down the result is denormal or 0, or
// clamped where the hardware has no scaling instruction; above 2^127 it is infinite or clamped.
template <int kDegree = 5> FASTFORMER_INLINE Vec exp2(Vec x) {
  static_assert(kDegree >= 3 && kDegree <= 5, "only these are fitted");
  static const float p5[] = {1.0f,          0.693146944f,   0.240221202f,
                             0.0555071309f, 0.00967554096f, 0.00132764713f};
  static const float p4[] = {0.999999285f, 0.693121791f, 0.240247443f, 0.0559178591f,
                             0.0095701013f};
  static const float p3[] = {0.999928057f, 0.693260968f, 0.242611125f, 0.0551716611f};
  const auto fitted = [](Vec f) {
    return kDegree == 5 ? polynomial(f, p5) : kDegree == 4 ? polynomial(f, p4) : polynomial(f, p3);
  };
#if defined(__AVX512BW__)
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = x - (Vec)n;
  const Vec y = fitted(f);
  return (Vec)_mm512_scalef_ps((__m512)y, n);
#else
  x = min(splat(127.0f), max(splat(-126.0f), x)); // in this order NaN stays
  const Vec magic = splat(12582912.0f);           // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  const Vec y = fitted(f);
  return bits<Vec>(bits<IntVec>(y) + (bits<IntVec>(shifted) << 23));
#endif
}

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

FASTFORMER_INLINE Vec exp(Vec x) {
#if defined(__AVX512BW__)
  // x * log2(e) in two parts, so that the error does not grow with |x|.
  const __m512 n =
      _mm512_roundscale_ps((__m512)(x * kLog2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = fma((Vec)n, splat(2.12194440e-4f), fma((Vec)n, splat(-0.693359375f), x));
#else
  x = min(splat(88.3f), max(splat(-87.3f), x)); // in this order NaN stays
  const Vec magic = splat(12582912.0f);
  const Vec shifted = fma(x, splat(kLog2e), magic), n = shifted - magic;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
#endif
  static const float p[] = {1.0f,         1.0f,          0.5f,         0.16666666f,
                            0.041665795f, 0.0083334519f, 0.0013981999f};
  const Vec y = polynomial(r, p);
#if defined(__AVX512BW__)
  return (Vec)_mm512_scalef_ps((__m512)y, n);
#else
  return bits<Vec>(bits<IntVec>(y) + (bits<IntVec>(shifted) << 23));
#endif
}

// log2 of positive normal numbers.
FASTFORMER_INLINE Vec log2(Vec x) {
  // x = 2^e m with m in [1/sqrt(2), sqrt(2)); log2(m) as an odd series in (m - 1) / (m + 1).
  const IntVec raw = bits<IntVec>(x) - 0x3f3504f3;
  const IntVec e = raw >> 23;
  const Vec m = bits<Vec>((raw & 0x007fffff) + 0x3f3504f3);
  const Vec t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  static const float p[] = {2.88539004f, 0.961798847f, 0.576713562f, 0.431756228f};
  return fma(t, polynomial(t2, p), __builtin_convertvector(e, Vec));
}

// ---- memory ----

FASTFORMER_INLINE Vec load(const float *p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTFORMER_INLINE void store(float *p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

FASTFORMER_INLINE Vec load(const bf16 *p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof(h));
#if defined(__AVX512BW__)
  return bits<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16));
#elif defined(__AVX2__)
  return bits<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16));
#else
  return bits<Vec>(__builtin_convertvector(h, UintVec) << 16);
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
FASTFORMER_INLINE HalfVec to_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return bits<HalfVec>(_mm512_cvtneps_pbh((__m512)v));
#else
  const UintVec u = bits<UintVec>(v);
  UintVec r = (u + (((u >> 16) & 1) + 0x7fff)) >> 16;
  r = v == v ? r : (u >> 16 | 0x40);
#if defined(__AVX512BW__)
  return bits<HalfVec>(_mm512_cvtepi32_epi16((__m512i)r));
#else
  return __builtin_convertvector(r, HalfVec);
#endif
#endif
}

FASTFORMER_INLINE void store(bf16 *p, Vec v) {
  const HalfVec h = to_bf16(v);
  std::memcpy(p, &h, sizeof(h));
}

// Address sanitizers do not see what masked instructions access.
#if defined(__AVX512BW__) && !defined(__SANITIZE_ADDRESS__)
#define FASTFORMER_MASKED_ACCESS
#endif

// The first n < kLanes elements; the other lanes are zero.
template <class T> FASTFORMER_INLINE Vec load(const T *p, int64_t n) {
#if defined(FASTFORMER_MASKED_ACCESS)
  const uint16_t mask = static_cast<uint16_t>((1u << n) - 1);
  if constexpr (sizeof(T) == 4)
    return (Vec)_mm512_maskz_loadu_ps(mask, p);
  else
    return bits<Vec>(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
#else
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
#endif
}

template <class T> FASTFORMER_INLINE void store(T *p, Vec v, int64_t n) {
#if defined(FASTFORMER_MASKED_ACCESS)
  const uint16_t mask = static_cast<uint16_t>((1u << n) - 1);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  else
    _mm256_mask_storeu_epi16(p, mask, (__m256i)to_bf16(v));
#else
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
#endif
}

// The value that reading back a stored `v` gives.
template <class T> FASTFORMER_INLINE Vec as_stored(Vec v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    const HalfVec h = to_bf16(v);
    return load(reinterpret_cast<const bf16 *>(&h));
  }
}

// A mask for keep_where from kLanes bytes that are 0xff or 0.
FASTFORMER_INLINE IntVec load_mask(const uint8_t *p) {
#if defined(__AVX512BW__)
  return (IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
  typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
  ByteVec bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, IntVec);
#endif
}

// ---- rows ----

// Stands for a whole vector where the end of a row has a number of elements.
struct Whole {};

template <class T> FASTFORMER_INLINE Vec load(const T *p, Whole) { return load(p); }
template <class T> FASTFORMER_INLINE void store(T *p, Vec v, Whole) { store(p, v); }

FASTFORMER_INLINE Vec first_lanes(Vec v, Whole) { return v; }
FASTFORMER_INLINE Vec first_lanes(Vec v, int64_t n) {
  return keep_where(lane_numbers() < static_cast<int32_t>(n), v);
}

// Calls f(col, n, i) for each vector of the columns [begin, end), where n is Whole or how many
// columns are left, and i counts from 0 to kUnroll - 1: sums kept apart by it do not wait for each
// other.
template <int kUnroll = 1, class F>
FASTFORMER_INLINE void for_each_vec(int64_t begin, int64_t end, const F &f) {
  int64_t col = begin;
  if constexpr (kUnroll > 1)
    for (; col + kUnroll * kLanes <= end; col += kUnroll * kLanes)
#pragma GCC unroll 8
      for (int i = 0; i < kUnroll; ++i)
        f(col + i * kLanes, Whole{}, i);
  for (; col + kLanes <= end; col += kLanes)
    f(col, Whole{}, 0);
  if (col < end)
    f(col, end - col, 0);
}

FASTFORMER_INLINE float to_float(float x) { return x; }
FASTFORMER_INLINE float to_float(bf16 x) {
  return bits<float>(static_cast<uint32_t>(x.bits) << 16);
}
FASTFORMER_INLINE void from_float(float *p, float x) { *p = x; }
FASTFORMER_INLINE void from_float(bf16 *p, float x) {
  const uint32_t u = bits<uint32_t>(x);
  p->bits = x == x ? static_cast<uint16_t>((u + (((u >> 16) & 1) + 0x7fff)) >> 16)
                   : static_cast<uint16_t>(u >> 16 | 0x40);
}

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
