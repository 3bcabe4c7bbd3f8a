// How the kernels of the feed-forward layer are launched.
#pragma once
#include <cstdint>

namespace fastformer {

constexpr int kMlpWarps = 8; // of a block: each has another row
constexpr int kMlpThreads = 32 * kMlpWarps;
constexpr int kMlpTileCols = 32 * 8; // of a block: eight neighbouring ones for each lane
// Blocks of rows, each with its column sums: with the columns' tiles, a few blocks for each
// multiprocessor of a large GPU. Not asked of the GPU, so that the sums are the same on all.
constexpr int64_t kMlpMaxSums = 256;

struct MlpLaunch {
  bool wide; // accesses of 16 bytes
  int64_t rows_per_block, row_blocks, blocks;
};

// For rows (N, F) of elements of `item` bytes; `address_bits` are those of the addresses of all
// matrices, or-ed together. With `sums` there are at most kMlpMaxSums blocks of rows.
inline MlpLaunch mlp_launch(int64_t N, int64_t F, int item, uint64_t address_bits, bool sums) {
  MlpLaunch launch;
  launch.wide = address_bits % 16 == 0 && F * item % 16 == 0;
  launch.rows_per_block = 2 * kMlpWarps;
  if (sums) {
    const int64_t rows_per_warp = (N + kMlpMaxSums * kMlpWarps - 1) / (kMlpMaxSums * kMlpWarps);
    launch.rows_per_block = kMlpWarps * (rows_per_warp > 1 ? rows_per_warp : 1);
  }
  launch.row_blocks = (N + launch.rows_per_block - 1) / launch.rows_per_block;
  launch.blocks = launch.row_blocks * ((F + kMlpTileCols - 1) / kMlpTileCols);
  return launch;
}

} // namespace fastformer
