// How the LayerNorm kernels are launched. Plain C++, so that tests ask the same function.
#pragma once
#include <cstdint>

namespace fastformer {

// A thread holds chunks of eight neighbouring columns: one draw of dropout, 16 or 32 bytes.
constexpr int kLayerNormChunk = 8;
constexpr int kLayerNormWarpChunks = 4; // of a lane where a warp has a row
constexpr int kLayerNormWarps = 4;      // rows of a block at a time where a warp has a row
constexpr int64_t kLayerNormWarpCols = 32 * kLayerNormWarpChunks * kLayerNormChunk;
constexpr int kLayerNormBlockChunks = 2; // of a thread where a block has a row
constexpr int kLayerNormBlockThreads = 512;
constexpr int64_t kLayerNormMaxCols =
    kLayerNormBlockThreads * kLayerNormBlockChunks * kLayerNormChunk;
// Blocks of a backward pass, each with its sums of weight and bias: a few for each multiprocessor
// of a large GPU. Not asked of the GPU, so that the sums are the same on all.
constexpr int64_t kLayerNormMaxSums = 256;
constexpr int kLayerNormGroup = 16; // blocks whose sums one of them adds up
constexpr int64_t kLayerNormTickets = 1 + kLayerNormMaxSums / kLayerNormGroup;

enum LayerNormMode : int {
  kLayerNormWarp = 0,   // a warp per row, accesses of 16 bytes
  kLayerNormBlock = 1,  // a block per row, accesses of 16 bytes
  kLayerNormScalar = 2, // a block per row, an element at a time
};

struct LayerNormLaunch {
  int mode, threads;
  int64_t blocks;
};

// Rows of sums that are enough for the blocks of a backward pass: one, if only to store zeros.
inline int64_t layer_norm_sums(int64_t N) {
  return N < 1 ? 1 : N < kLayerNormMaxSums ? N : kLayerNormMaxSums;
}

// `address_bits` are those of the addresses of all matrices and vectors, or-ed together;
// `has_16_bit` says that one of them has elements of two bytes. C is at most kLayerNormMaxCols.
inline LayerNormLaunch layer_norm_launch(int64_t N, int64_t C, bool has_16_bit,
                                         uint64_t address_bits, bool backward) {
  const bool wide = address_bits % 16 == 0 && C % (has_16_bit ? 8 : 4) == 0;
  const bool warp = wide && C <= kLayerNormWarpCols;
  const int64_t columns = kLayerNormBlockChunks * kLayerNormChunk; // of a thread
  const int64_t rows = warp ? kLayerNormWarps : 1;                 // of a block at a time
  LayerNormLaunch launch;
  launch.mode = warp ? kLayerNormWarp : wide ? kLayerNormBlock : kLayerNormScalar;
  launch.threads =
      static_cast<int>(warp ? 32 * rows : ((C + columns - 1) / columns + 31) / 32 * 32);
  launch.blocks = (N + rows - 1) / rows;
  if (backward)
    launch.blocks = layer_norm_sums(launch.blocks);
  return launch;
}

} // namespace fastformer
