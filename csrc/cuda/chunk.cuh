// A thread's share of a row: eight neighbouring elements, as float32 in registers.
#pragma once
#include "philox.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// nvcc: an anonymous namespace here and one in a source file have to be the same one, hence
// fastformer's.
namespace fastformer {
namespace {

constexpr int kChunk = kColsPerDraw; // its dropout is one draw

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T> union Wide {
  __device__ Wide() : bits(make_uint4(0, 0, 0, 0)) {}
  uint4 bits;
  T x[16 / sizeof(T)];
};

// Columns [col, col + 8) of a row of C; zeros beyond it. kWide: the row is aligned to 16 bytes.
template <bool kWide, typename T>
__device__ __forceinline__ void load(float (&v)[kChunk], const T *row, int col, int C) {
  if constexpr (kWide) {
    constexpr int kPiece = 16 / sizeof(T);
#pragma unroll
    for (int p = 0; p < kChunk; p += kPiece) {
      Wide<T> piece;
      if (col + p < C)
        piece.bits = *reinterpret_cast<const uint4 *>(row + col + p);
#pragma unroll
      for (int j = 0; j < kPiece; ++j)
        v[p + j] = to_float(piece.x[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      v[j] = col + j < C ? to_float(row[col + j]) : 0.0f;
  }
}

template <bool kWide, typename T>
__device__ __forceinline__ void store(T *row, const float (&v)[kChunk], int col, int C) {
  if constexpr (kWide) {
    constexpr int kPiece = 16 / sizeof(T);
#pragma unroll
    for (int p = 0; p < kChunk; p += kPiece) {
      Wide<T> piece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j)
        piece.x[j] = from_float<T>(v[p + j]);
      if (col + p < C)
        *reinterpret_cast<uint4 *>(row + col + p) = piece.bits;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (col + j < C)
        row[col + j] = from_float<T>(v[j]);
  }
}

// The draw for columns [col, col + 8) of a row.
__device__ __forceinline__ PhiloxWords draw(uint64_t seed, uint64_t stream, int64_t row, int col) {
  return dropout_draw(seed, stream, static_cast<uint32_t>(row),
                      static_cast<uint32_t>(col / kChunk));
}

// Zeros what is dropped and scales the rest.
__device__ __forceinline__ void apply_dropout(float (&v)[kChunk], const PhiloxWords &words,
                                              uint32_t threshold, float scale) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    v[j] = dropout_keep(words, j, threshold) ? v[j] * scale : v[j] * 0.0f; // NaN stays, as in torch
}

} // namespace
} // namespace fastformer
