// Products of large matrices: out = A B, plus a bias or what `out` holds.
//
// For machines whose libraries leave time on the table; csrc/ops/gemm.cpp decides which those are.
// B is packed once, in panels of columns. Then each pair of a block of rows and a panel is a piece
// of work of its own, always done in the same order.
#pragma once
#include <cstdint>

namespace fastformer::cpu {

// A (M, K) and B (K, N) have stride 1 in one of their dimensions, `out` (M, N) in its second; all
// strides are in elements. In bfloat16 that is not widened, K and a_row must be even where a_col is
// 1, and K where b_row is 1.
struct Gemm {
  int64_t M, N, K;
  const void *a;
  int64_t a_row, a_col;
  const void *b;
  int64_t b_row, b_col;
  void *out;
  int64_t out_row;
  const float *bias;  // (N,), may be null
  bool add;           // to what `out` holds
  int64_t block_rows; // of A and `out`, in a piece of work
  void *packed;       // packed_bytes, for B
};

// Sizes, and the kernels by whether the operands are bfloat16 rather than float32.
struct GemmKernels {
  int64_t panel_cols, max_block_rows, tile_rows;
  bool widens_bf16; // to float32, as this instruction set does not multiply bfloat16

  // Packs the panels [begin, end) of B.
  void (*pack[2])(const Gemm &, int64_t begin, int64_t end);

  // The pieces of work [begin, end), of which number row_block * panels + panel is a block of rows
  // times a panel. `scratch` has scratch_bytes(end - begin). The second index says whether `out` is
  // bfloat16 rather than float32, which it is not if the operands are float32.
  void (*multiply[2][2])(const Gemm &, void *scratch, int64_t begin, int64_t end);
  int64_t (*scratch_bytes[2])(const Gemm &, int64_t pieces);

  int64_t panels(const Gemm &g) const { return (g.N + panel_cols - 1) / panel_cols; }

  // Whole tiles, and about as many in each block: threads that share few blocks end together.
  int64_t block_rows(const Gemm &g) const {
    const int64_t tiles = (g.M + tile_rows - 1) / tile_rows, most = max_block_rows / tile_rows;
    const int64_t blocks = (tiles + most - 1) / most;
    return (tiles + blocks - 1) / blocks * tile_rows;
  }
  int64_t packed_bytes(const Gemm &g, int type) const {
    const int64_t bytes = type == 0 || widens_bf16 ? 4 : 2;
    return panels(g) * panel_cols * (g.K + g.K % 2) * bytes;
  }
};

} // namespace fastformer::cpu
