// How the attention kernels are launched. Plain C++, so that tests ask the same functions.
#pragma once
#include "philox.h"

#include <cstdint>

namespace fastformer {

// Where in its row of shared memory a chunk of 16 bytes lies, one of `chunks`, 4 or a multiple of
// 4: eight of one column and of neighbouring rows, which ldmatrix reads together, are in different
// banks.
FASTFORMER_HOST_DEVICE int attention_chunk(int chunks, int row, int chunk) {
  return chunk ^ (chunks % 8 ? (row >> 1) & 3 : row & 7);
}

constexpr int kAttentionWarpRows = 16; // of a warp: queries in forward, keys in backward

// Forward: a block has two tiles of keys and values, which it fills in turn.
constexpr int kAttentionFwdStages = 2;

// Backward: a block has a head. Its warps hold as many keys as registers have room for gradients
// of, and all of them meet one tile of queries after the other.
struct AttentionSizes {
  int dim;         // of rows in shared memory, where those of a head are padded
  int fwd_warps;   // at most
  int fwd_keys;    // of a tile
  int bwd_warps;   // at most
  int bwd_queries; // of a tile
};
constexpr AttentionSizes kAttentionNarrow = {64, 8, 64, 16, 64},
                         kAttentionWide = {128, 6, 32, 8, 32};

struct AttentionLaunch {
  int dim, threads;
  int64_t blocks, shared_bytes;
};

inline AttentionSizes attention_sizes(int64_t D) {
  return D <= kAttentionNarrow.dim ? kAttentionNarrow : kAttentionWide;
}

// `heads` are those of all sequences. T is the length of the longest.
inline AttentionLaunch attention_fwd_launch(int64_t heads, int64_t T, int64_t D) {
  const AttentionSizes sizes = attention_sizes(D);
  const int64_t tiles = T > 0 ? (T + kAttentionWarpRows - 1) / kAttentionWarpRows : 1;
  const int64_t least = (tiles + sizes.fwd_warps - 1) / sizes.fwd_warps;
  const int64_t warps = (tiles + least - 1) / least; // the blocks of a head have equal shares
  const int64_t rows = warps * kAttentionWarpRows + 2 * kAttentionFwdStages * sizes.fwd_keys;
  return {sizes.dim, static_cast<int>(32 * warps), heads * ((tiles + warps - 1) / warps),
          rows * sizes.dim * 2};
}

// S is the length of the longest sequence of keys.
inline AttentionLaunch attention_bwd_launch(int64_t heads, int64_t S, int64_t D) {
  const AttentionSizes sizes = attention_sizes(D);
  int warps = 4;
  while (warps < sizes.bwd_warps && warps * kAttentionWarpRows < S)
    warps *= 2;
  const int64_t keys = warps * kAttentionWarpRows, queries = sizes.bwd_queries, dim = sizes.dim;
  // K, V; gradients of the scores; two tiles of Q and of the gradient of out, one of out; for each
  // query of them lse twice, and what the kernel makes of it and of out.
  const int64_t shared =
      keys * dim * 2 * 2 + keys * queries * 2 + 5 * queries * dim * 2 + queries * 4 * 4;
  return {sizes.dim, 32 * warps, heads, shared};
}

// Floats of scratch that backward needs: the sums of grad_q where a block meets its keys in turns.
inline int64_t attention_bwd_sums(int64_t heads, int64_t T, int64_t S, int64_t D) {
  const AttentionLaunch launch = attention_bwd_launch(heads, S, D);
  const int64_t queries = attention_sizes(D).bwd_queries;
  const bool in_turns = S > launch.threads / 32 * kAttentionWarpRows;
  return in_turns ? heads * ((T + queries - 1) / queries) * queries * launch.dim : 0;
}

} // namespace fastformer
