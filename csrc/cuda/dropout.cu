// Dropout masks on the GPU: one thread makes one draw, eight neighbouring elements of a row.
#include "cuda/launchers.h"
#include "philox.h"

#include <cuda_runtime.h>

// nvcc: an anonymous namespace here and one in a header have to be the same one, hence
// fastformer's.
namespace fastformer {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

__global__ void dropout_mask_kernel(uint8_t *__restrict__ keep, const int64_t *__restrict__ rng,
                                    int64_t rows, int64_t cols, int64_t site, uint32_t threshold) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  const uint64_t stream = static_cast<uint64_t>(rng[1]) + static_cast<uint64_t>(site);
  const int64_t draws_per_row = (cols + kColsPerDraw - 1) / kColsPerDraw;
  const int64_t draws = rows * draws_per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < draws;
       i += step) {
    const int64_t row = i / draws_per_row, group = i % draws_per_row;
    const PhiloxWords draw =
        dropout_draw(seed, stream, static_cast<uint32_t>(row), static_cast<uint32_t>(group));
    const int64_t col = group * kColsPerDraw;
    uint8_t *out = keep + row * cols + col;
    if (cols % kColsPerDraw == 0) {
      uint2 bytes = {0, 0};
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        bytes.x |= static_cast<uint32_t>(dropout_keep(draw, lane, threshold)) << (8 * lane);
        bytes.y |= static_cast<uint32_t>(dropout_keep(draw, lane + 4, threshold)) << (8 * lane);
      }
      *reinterpret_cast<uint2 *>(out) = bytes;
    } else {
#pragma unroll
      for (int lane = 0; lane < kColsPerDraw; ++lane)
        if (col + lane < cols)
          out[lane] = dropout_keep(draw, lane, threshold);
    }
  }
}

} // namespace
} // namespace fastformer

extern "C" int fastformer_dropout_mask(bool *keep, const int64_t *rng, int64_t rows, int64_t cols,
                                       int64_t site, uint32_t threshold, fastformer_stream stream) {
  using namespace fastformer;
  const int64_t draws = rows * ((cols + kColsPerDraw - 1) / kColsPerDraw);
  if (draws == 0)
    return cudaSuccess;
  const int64_t blocks = (draws + kThreads - 1) / kThreads;
  dropout_mask_kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads,
                        0, stream>>>(reinterpret_cast<uint8_t *>(keep), rng, rows, cols, site,
                                     threshold);
  return cudaGetLastError();
}
