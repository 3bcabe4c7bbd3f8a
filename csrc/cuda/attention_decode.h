// How the kernels of attention from few queries are launched. Plain C++, so that tests ask the same
// function.
#pragma once
#include <cstdint>

namespace fastformer {

constexpr int64_t kDecodeMaxQueries = 16;
constexpr int64_t kDecodeMaxKeys = int64_t{1} << 30; // the index of a key after the last one is int
constexpr int kDecodeThreads = 128;
constexpr int kDecodeCols = 8;    // neighbouring columns of a lane: 16 or 32 bytes
constexpr int kDecodeQueries = 4; // of a block, where there are several
// Enough blocks to read at the speed of memory, and what is worth one. Not asked of the GPU, so
// that all of them add in the same order.
constexpr int64_t kDecodeBlocks = 512;
constexpr int64_t kDecodeLeastChunk = 128;
constexpr int64_t kDecodeMaxChunks = 64;
constexpr int64_t kDecodeChunkUnit = 64; // the most keys that a block reads at a time
constexpr int64_t kDecodeMergeRows = kDecodeThreads * kDecodeCols / 128; // of a block, D up to 128

struct DecodeLaunch {
  int lanes;   // that hold a key
  int queries; // of a block: all of them read its keys once
  int threads;
  int64_t chunk, chunks; // keys of a block, and how many blocks share a query
  int64_t blocks;
  int64_t merge_blocks; // of the second launch, none where there is one chunk
};

inline DecodeLaunch decode_launch(int64_t B, int64_t T, int64_t S, int64_t H, int64_t D) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  DecodeLaunch launch;
  launch.lanes = D <= 64 ? 8 : 16;
  launch.queries = T == 1 ? 1 : kDecodeQueries;
  launch.threads = kDecodeThreads;
  const int64_t tiles = B * H * divide_up(T, launch.queries);
  int64_t chunks = tiles ? divide_up(kDecodeBlocks, tiles) : 1;
  if (chunks > S / kDecodeLeastChunk)
    chunks = S / kDecodeLeastChunk;
  if (chunks > kDecodeMaxChunks)
    chunks = kDecodeMaxChunks;
  if (chunks < 1)
    chunks = 1;
  launch.chunk = divide_up(divide_up(S, chunks), kDecodeChunkUnit) * kDecodeChunkUnit;
  launch.chunks = S ? divide_up(S, launch.chunk) : 1;
  launch.blocks = tiles * launch.chunks;
  launch.merge_blocks = launch.chunks > 1 ? divide_up(B * T * H, kDecodeMergeRows) : 0;
  return launch;
}

// Floats that the chunks leave for the second launch: out, then lse, of each row of each chunk.
inline int64_t decode_scratch(const DecodeLaunch &launch, int64_t rows, int64_t D) {
  return launch.chunks > 1 ? launch.chunks * rows * (D + 1) : 0;
}

} // namespace fastformer
