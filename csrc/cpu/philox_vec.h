// Philox-4x32-10 on vectors: many draws of one row at once, for the ops that drop on the fly.
//
// A 32 x 32 -> 64 bit multiply reads only the low half of each 64-bit lane, so a counter word lives
// there with anything above it, and a round is two multiplies, two shifts and four exclusive ors.
// Two such half-filled sets (even and odd draws) make one set of full words at the end.
#pragma once
#include "philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

#if defined(__AVX512BW__)

constexpr int kDraws = 16;
using PhiloxVec = __m512i;

inline PhiloxVec broadcast(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline PhiloxVec broadcast16(uint32_t x) { return _mm512_set1_epi16(static_cast<short>(x)); }
inline PhiloxVec add(PhiloxVec a, PhiloxVec b) { return _mm512_add_epi32(a, b); }
inline PhiloxVec mul(PhiloxVec a, PhiloxVec b) { return _mm512_mul_epu32(a, b); }
inline PhiloxVec high(PhiloxVec a) { return _mm512_srli_epi64(a, 32); }
inline PhiloxVec xor3(PhiloxVec a, PhiloxVec b, PhiloxVec c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
inline PhiloxVec interleave(PhiloxVec even, PhiloxVec odd) {
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
// The even draws, in an order for which store_keep writes its two halves where they belong.
inline PhiloxVec even_draws() {
  return _mm512_set_epi32(0, 14, 0, 6, 0, 12, 0, 4, 0, 10, 0, 2, 0, 8, 0, 0);
}
inline PhiloxVec at_least(PhiloxVec a, PhiloxVec b) {
  return _mm512_movm_epi16(_mm512_cmpge_epu16_mask(a, b));
}
inline PhiloxVec low32(PhiloxVec a, PhiloxVec b) { return _mm512_unpacklo_epi32(a, b); }
inline PhiloxVec high32(PhiloxVec a, PhiloxVec b) { return _mm512_unpackhi_epi32(a, b); }
inline PhiloxVec pack64(PhiloxVec a, PhiloxVec b) {
  return _mm512_packs_epi16(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
inline void store_bools(uint8_t *out, PhiloxVec mask) {
  _mm512_storeu_si512(out, _mm512_and_si512(mask, _mm512_set1_epi8(1)));
}

#elif defined(__AVX2__)

constexpr int kDraws = 8;
using PhiloxVec = __m256i;

inline PhiloxVec broadcast(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline PhiloxVec broadcast16(uint32_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
inline PhiloxVec add(PhiloxVec a, PhiloxVec b) { return _mm256_add_epi32(a, b); }
inline PhiloxVec mul(PhiloxVec a, PhiloxVec b) { return _mm256_mul_epu32(a, b); }
inline PhiloxVec high(PhiloxVec a) { return _mm256_srli_epi64(a, 32); }
inline PhiloxVec xor3(PhiloxVec a, PhiloxVec b, PhiloxVec c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline PhiloxVec interleave(PhiloxVec even, PhiloxVec odd) {
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
inline PhiloxVec even_draws() { return _mm256_set_epi32(0, 6, 0, 2, 0, 4, 0, 0); }
inline PhiloxVec at_least(PhiloxVec a, PhiloxVec b) {
  return _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a);
}
inline PhiloxVec low32(PhiloxVec a, PhiloxVec b) { return _mm256_unpacklo_epi32(a, b); }
inline PhiloxVec high32(PhiloxVec a, PhiloxVec b) { return _mm256_unpackhi_epi32(a, b); }
inline PhiloxVec pack64(PhiloxVec a, PhiloxVec b) {
  return _mm256_packs_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
inline void store_bools(uint8_t *out, PhiloxVec mask) {
  const PhiloxVec bools = _mm256_and_si256(mask, _mm256_set1_epi8(1));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), bools);
}

#else

constexpr int kDraws = 1;

#endif

constexpr int kColsPerVec = kDraws * kColsPerDraw;

#if defined(__AVX2__)

struct VecWords {
  PhiloxVec w[4];
};

inline VecWords philox(uint64_t key, VecWords c) {
  const PhiloxVec m0 = broadcast(kPhiloxM0), m1 = broadcast(kPhiloxM1);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const PhiloxVec p0 = mul(m0, c.w[0]), p1 = mul(m1, c.w[2]);
    c = {{xor3(high(p1), c.w[1], broadcast(k0)), p1, xor3(high(p0), c.w[3], broadcast(k1)), p0}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// Writes kColsPerVec bytes, 1 where the element is kept, from column 8 * col_group on.
inline void store_keep(uint8_t *out, uint64_t seed, uint64_t stream, uint32_t row,
                       uint32_t col_group, uint32_t threshold) {
  const PhiloxVec c1 = broadcast(row), c2 = broadcast(static_cast<uint32_t>(stream)),
                  c3 = broadcast(static_cast<uint32_t>(stream >> 32));
  const PhiloxVec groups = add(even_draws(), broadcast(col_group));
  const VecWords even = philox(seed, {{groups, c1, c2, c3}});
  const VecWords odd = philox(seed, {{add(groups, broadcast(1)), c1, c2, c3}});
  const PhiloxVec limit = broadcast16(threshold);
  PhiloxVec keep[4];
  for (int j = 0; j < 4; ++j)
    keep[j] = at_least(interleave(even.w[j], odd.w[j]), limit);
  store_bools(out, pack64(low32(keep[0], keep[1]), low32(keep[2], keep[3])));
  store_bools(out + sizeof(PhiloxVec), pack64(high32(keep[0], keep[1]), high32(keep[2], keep[3])));
}

#else

inline void store_keep(uint8_t *out, uint64_t seed, uint64_t stream, uint32_t row,
                       uint32_t col_group, uint32_t threshold) {
  const PhiloxWords draw = dropout_draw(seed, stream, row, col_group);
  for (int lane = 0; lane < kColsPerDraw; ++lane)
    out[lane] = dropout_keep(draw, lane, threshold);
}

#endif

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
