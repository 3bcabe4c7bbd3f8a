// Products of blocks that stay in cache, summed in float32, for attention and larger products.
//
// Operands are counted in units along the dimension that is summed over: a float, or, where the
// machine multiplies pairs of bfloat16 in one instruction, two neighbouring bfloat16. A is read one
// unit at a time and broadcast, in any layout; B is packed, a row of units a vector at a time.
#pragma once
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

struct Pair {
  bf16 low, high;
};

// Unit<T>: what a block of T is multiplied in; Element<Unit>: what such a block is stored as.
#if defined(__AVX512BF16__)
template <class T> struct UnitOf {
  using type = Pair;
};
#else
template <class T> struct UnitOf {
  using type = float;
};
#endif
template <> struct UnitOf<float> {
  using type = float;
};
template <class T> using Unit = typename UnitOf<T>::type;

template <class U> constexpr int kPerUnit = sizeof(U) == sizeof(Pair) && alignof(U) == 2 ? 2 : 1;

#if defined(__AVX512BF16__)
FASTFORMER_INLINE Vec multiply_add(Vec c, __m512i a, __m512i b) {
  return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
FASTFORMER_INLINE __m512i broadcast_unit(const Pair *p) {
  return _mm512_set1_epi32(static_cast<int>(bits<uint32_t>(*p)));
}
FASTFORMER_INLINE __m512i load_units(const Pair *p) { return _mm512_loadu_si512(p); }
#endif
FASTFORMER_INLINE Vec multiply_add(Vec c, Vec a, Vec b) { return fma(a, b, c); }
FASTFORMER_INLINE Vec broadcast_unit(const float *p) { return splat(*p); }
FASTFORMER_INLINE Vec load_units(const float *p) { return load(p); }

// Where a product goes: to a block of float32, or onto what is there.
struct Sums {
  float *out;
  int64_t stride;
  bool accumulate;

  void advance(int64_t rows, int64_t vectors) { out += rows * stride + vectors * kLanes; }

  template <int M, int N> FASTFORMER_INLINE void take(Vec (&c)[M][N]) const {
    if (accumulate) {
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
          c[i][j] += load(out + i * stride + j * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        store(out + i * stride + j * kLanes, c[i][j]);
  }
};

// Where the operands lie, in units. A target advances like Sums and takes tiles of the product.
template <class U, class Target = Sums> struct Product {
  const U *a;
  int64_t a_row, a_col; // strides of A
  const U *b;
  int64_t ldb;
  Target to;
  int64_t depth; // units summed over
};

template <int M, int N, class U, class Target>
inline void multiply_tile(const Product<U, Target> &p) {
  Vec c[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
      c[i][j] = zero();
  const U *a = p.a, *b = p.b;
  const int64_t a_row = p.a_row, a_col = p.a_col, ldb = p.ldb;
  for (int64_t k = 0; k < p.depth; ++k, a += a_col, b += ldb) {
    decltype(load_units(b)) row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
      row[j] = load_units(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto unit = broadcast_unit(a + i * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        c[i][j] = multiply_add(c[i][j], unit, row[j]);
    }
  }
  p.to.take(c);
}

// Rows of a tile of N vectors: as many accumulators as fit beside a row of B and one unit of A.
#if defined(__AVX512BW__) || defined(__aarch64__)
constexpr int kMaxVectors = 4;
template <int N> constexpr int kTileRows = N == 4 ? 6 : N == 3 ? 8 : N == 2 ? 12 : 14;
#else
constexpr int kMaxVectors = 2;
template <int N> constexpr int kTileRows = N == 2 ? 6 : 10;
#endif

template <int N, class U, class Target> void multiply_rows(Product<U, Target> p, int64_t rows) {
  constexpr int M = kTileRows<N>;
  const auto advance = [&](int64_t by) {
    rows -= by;
    p.a += by * p.a_row;
    p.to.advance(by, 0);
  };
  for (; rows >= M; advance(M))
    multiply_tile<M, N>(p);
  if (M > 8)
    for (; rows >= 8; advance(8))
      multiply_tile<8, N>(p);
  for (; rows >= 4; advance(4))
    multiply_tile<4, N>(p);
  for (; rows >= 2; advance(2))
    multiply_tile<2, N>(p);
  for (; rows >= 1; advance(1))
    multiply_tile<1, N>(p);
}

// Gives the product, of `rows` and `vectors` * kLanes columns, to its target.
template <class U, class Target>
void multiply(Product<U, Target> p, int64_t rows, int64_t vectors) {
  const auto advance = [&](int by) {
    vectors -= by;
    p.b += by * kLanes;
    p.to.advance(0, by);
  };
  for (; vectors >= kMaxVectors; advance(kMaxVectors))
    multiply_rows<kMaxVectors>(p, rows);
#if defined(__AVX512BW__) || defined(__aarch64__)
  if (vectors == 3)
    return multiply_rows<3>(p, rows);
  if (vectors == 2)
    return multiply_rows<2>(p, rows);
#endif
  if (vectors == 1)
    multiply_rows<1>(p, rows);
}

// ---- packing ----
//
// `rows` rows of D elements of T, `stride` apart. Padding is zero, so that it may be multiplied.

#if defined(__AVX512BW__)
// Transposes 16 x 16 units of 32 bits; rows and columns that are not there are zero.
inline void transpose_units(const void *src, int64_t row_bytes, int rows, int units, void *out,
                            int64_t width) {
  const __mmask16 columns = static_cast<__mmask16>((1u << units) - 1);
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i)
    r[i] = i < rows
               ? _mm512_maskz_loadu_epi32(columns, static_cast<const char *>(src) + i * row_bytes)
               : _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
  for (int i = 0; i < units; ++i)
    _mm512_storeu_si512(static_cast<uint32_t *>(out) + i * width, r[i]);
}

// out[unit][row]: the rows become columns. `width`, a multiple of kLanes, is the length of out's
// rows, and `factor` is 1, -1 or 0.
template <class U, class T>
void pack_columns_exact(const T *src, int64_t stride, int64_t rows, int64_t units, U *out,
                        int64_t width) {
  for (int64_t i = 0; i < width; i += 16) {
    const int present = static_cast<int>(rows - i < 0 ? 0 : rows - i < 16 ? rows - i : 16);
    for (int64_t u = 0; u < units; u += 16)
      transpose_units(src + i * stride + u * kPerUnit<U>, stride * static_cast<int64_t>(sizeof(T)),
                      present, static_cast<int>(units - u < 16 ? units - u : 16),
                      out + u * width + i, width);
  }
}
#elif defined(__AVX2__)
inline void transpose(Vec (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0x44);
      u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    r[i] = (Vec)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = (Vec)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

template <class T>
void pack_columns(const T *src, int64_t stride, int64_t rows, int64_t D, float factor, float *out,
                  int64_t width) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == sizeof(float)) {
    pack_columns_exact(src, stride, rows, D, out, width);
    if (factor != 1.0f)
      for (int64_t i = 0; i < D * width; i += kLanes)
        store(out + i, load(out + i) * factor);
    return;
  }
#elif defined(__AVX2__)
  for (int64_t i = 0; i < width; i += kLanes)
    for (int64_t d = 0; d < D; d += kLanes) {
      const int64_t columns = D - d < kLanes ? D - d : kLanes;
      Vec r[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        const T *row = src + (i + j) * stride + d;
        r[j] = i + j >= rows ? zero() : columns == kLanes ? load(row) : load(row, columns);
      }
      transpose(r);
      for (int j = 0; j < columns; ++j)
        store(out + (d + j) * width + i, r[j] * factor);
    }
  return;
#endif
  for (int64_t d = 0; d < D; ++d)
    for (int64_t i = rows; i < width; ++i)
      out[d * width + i] = 0.0f;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < D; ++d)
      out[d * width + i] = factor * to_float(src[i * stride + d]);
}

// out[row][element], padded to `width` elements.
template <class T>
void pack_rows(const T *src, int64_t stride, int64_t rows, int64_t D, float *out, int64_t width) {
  for (int64_t i = 0; i < rows; ++i, src += stride, out += width) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes)
      store(out + d, load(src + d));
    if (d < D)
      store(out + d, load(src + d, D - d));
  }
}

#if defined(__AVX512BF16__)

inline void pack_columns(const bf16 *src, int64_t stride, int64_t rows, int64_t D, float factor,
                         Pair *out, int64_t width) {
  pack_columns_exact(src, stride, rows, D / 2, out, width);
  if (factor != 1.0f)
    for (int64_t i = 0; i < D / 2 * width; ++i) {
      from_float(&out[i].low, factor * to_float(out[i].low));
      from_float(&out[i].high, factor * to_float(out[i].high));
    }
}

// out[row / 2][element] = the pair of two rows' elements.
inline void pack_rows(const bf16 *src, int64_t stride, int64_t rows, int64_t D, Pair *out,
                      int64_t width) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second_half = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < rows; i += 2, src += 2 * stride, out += width)
    for (int64_t d = 0; d < D; d += 32) {
      const __mmask32 m = D - d < 32 ? (1u << (D - d)) - 1 : ~0u;
      const __m512i low = _mm512_maskz_loadu_epi16(m, src + d);
      const __m512i high =
          i + 1 < rows ? _mm512_maskz_loadu_epi16(m, src + stride + d) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(low, order, high));
      if (D - d > 16)
        _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(low, second_half, high));
    }
}

#endif

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
