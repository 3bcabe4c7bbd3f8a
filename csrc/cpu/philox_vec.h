// Philox-4x32-10 on vectors: many draws of one row at once, for the ops that drop on the fly.
//
// A 32 x 32 -> 64 bit multiply reads only the low half of each 64-bit lane, so a counter word lives
// there with anything above it, and a round is two multiplies, two shifts and four exclusive ors.
// Two such half-filled sets (even and odd draws) make one set of full words at the end.
#pragma once
#include "cpu/dropout.h"
#include "philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

#if defined(__AVX512BW__)

constexpr int kDraws = 16;
using Words = __m512i;

inline Words broadcast(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Words broadcast16(uint32_t x) { return _mm512_set1_epi16(static_cast<short>(x)); }
inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words mul(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
inline Words interleave(Words even, Words odd) {
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
// The even draws, in an order for which store_keep writes its two halves where they belong.
inline Words even_draws() {
  return _mm512_set_epi32(0, 14, 0, 6, 0, 12, 0, 4, 0, 10, 0, 2, 0, 8, 0, 0);
}
inline Words at_least(Words a, Words b) { return _mm512_movm_epi16(_mm512_cmpge_epu16_mask(a, b)); }
inline Words low32(Words a, Words b) { return _mm512_unpacklo_epi32(a, b); }
inline Words high32(Words a, Words b) { return _mm512_unpackhi_epi32(a, b); }
inline Words pack64(Words a, Words b) {
  return _mm512_packs_epi16(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
inline void store_bytes(uint8_t *out, Words mask, uint8_t byte) {
  _mm512_storeu_si512(out, _mm512_and_si512(mask, _mm512_set1_epi8(static_cast<char>(byte))));
}

#elif defined(__AVX2__)

constexpr int kDraws = 8;
using Words = __m256i;

inline Words broadcast(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Words broadcast16(uint32_t x) { return _mm256_set1_epi16(static_cast<short>(x)); }
inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words mul(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words xor3(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Words interleave(Words even, Words odd) {
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
inline Words even_draws() { return _mm256_set_epi32(0, 6, 0, 2, 0, 4, 0, 0); }
inline Words at_least(Words a, Words b) { return _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a); }
inline Words low32(Words a, Words b) { return _mm256_unpacklo_epi32(a, b); }
inline Words high32(Words a, Words b) { return _mm256_unpackhi_epi32(a, b); }
inline Words pack64(Words a, Words b) {
  return _mm256_packs_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
inline void store_bytes(uint8_t *out, Words mask, uint8_t byte) {
  const Words bytes = _mm256_and_si256(mask, _mm256_set1_epi8(static_cast<char>(byte)));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), bytes);
}

#else

constexpr int kDraws = 1;

#endif

constexpr int kColsPerVec = kDraws * kColsPerDraw;

#if defined(__AVX2__)

struct Draws {
  Words w[4];
};

inline Draws philox(uint64_t key, Draws c) {
  const Words m0 = broadcast(kPhiloxM0), m1 = broadcast(kPhiloxM1);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Words p0 = mul(m0, c.w[0]), p1 = mul(m1, c.w[2]);
    c = {{xor3(high(p1), c.w[1], broadcast(k0)), p1, xor3(high(p0), c.w[3], broadcast(k1)), p0}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// Writes kColsPerVec bytes, kKept where the element is kept and else 0, from column 8 * col_group
// on.
template <uint8_t kKept = 1>
inline void store_keep(uint8_t *out, uint64_t seed, uint64_t stream, uint32_t row,
                       uint32_t col_group, uint32_t threshold) {
  const Words c1 = broadcast(row), c2 = broadcast(static_cast<uint32_t>(stream)),
              c3 = broadcast(static_cast<uint32_t>(stream >> 32));
  const Words groups = add(even_draws(), broadcast(col_group));
  const Draws even = philox(seed, {{groups, c1, c2, c3}});
  const Draws odd = philox(seed, {{add(groups, broadcast(1)), c1, c2, c3}});
  const Words limit = broadcast16(threshold);
  Words keep[4];
  for (int j = 0; j < 4; ++j)
    keep[j] = at_least(interleave(even.w[j], odd.w[j]), limit);
  store_bytes(out, pack64(low32(keep[0], keep[1]), low32(keep[2], keep[3])), kKept);
  store_bytes(out + sizeof(Words), pack64(high32(keep[0], keep[1]), high32(keep[2], keep[3])),
              kKept);
}

#else

template <uint8_t kKept = 1>
inline void store_keep(uint8_t *out, uint64_t seed, uint64_t stream, uint32_t row,
                       uint32_t col_group, uint32_t threshold) {
  const PhiloxWords draw = dropout_draw(seed, stream, row, col_group);
  for (int lane = 0; lane < kColsPerDraw; ++lane)
    out[lane] = dropout_keep(draw, lane, threshold) ? kKept : 0;
}

#endif

// Columns of a row whose mask is drawn at once: few, so that memory is read meanwhile.
constexpr int kKeepCols = kColsPerVec > 64 ? kColsPerVec : 64;

// Fills `keep` for kKeepCols columns of a row, to be read by load_mask of vec.h; `col` is a
// multiple of 8. Not inlined: a draw is 150 instructions, and a kernel has several loops.
inline __attribute__((noinline)) void draw_keep(uint8_t (&keep)[kKeepCols], const Dropout &dropout,
                                                int64_t row, int64_t col) {
  for (int i = 0; i < kKeepCols; i += kColsPerVec)
    store_keep<0xff>(keep + i, dropout.seed, dropout.stream, static_cast<uint32_t>(row),
                     static_cast<uint32_t>((col + i) / kColsPerDraw), dropout.threshold);
}

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
