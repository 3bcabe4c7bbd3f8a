// Philox-4x32-10 for host and device (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011, section 3), and the one way in which this project turns its words into a keep mask.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTFORMER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTFORMER_HOST_DEVICE inline
#endif

namespace fastformer {
// Internal linkage: a copy compiled for AVX-512 must not stand in for the one of an older CPU.
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

// One draw yields eight 16-bit numbers, for eight neighbouring columns of one row.
constexpr int kColsPerDraw = 8;

struct PhiloxWords {
  uint32_t w[4];
};

FASTFORMER_HOST_DEVICE PhiloxWords philox(uint64_t key, PhiloxWords counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The draw for columns [8 * col_group, 8 * col_group + 8) of `row`; `stream` is offset + site.
FASTFORMER_HOST_DEVICE PhiloxWords dropout_draw(uint64_t seed, uint64_t stream, uint32_t row,
                                                uint32_t col_group) {
  return philox(
      seed, {{col_group, row, static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}});
}

FASTFORMER_HOST_DEVICE bool dropout_keep(const PhiloxWords &draw, int lane, uint32_t threshold) {
  return ((draw.w[lane >> 1] >> (16 * (lane & 1))) & 0xffff) >= threshold;
}

} // namespace
} // namespace fastformer
