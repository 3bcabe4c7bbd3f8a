// What forward and backward of attention share: the geometry of one (sequence, head), its division
// into tiles of keys by queries, and the dropout of a tile.
//
// A tile holds scores transposed, a row per key and a column per query. So softmax's maxima and
// sums run down the columns, a vector of queries at a time and without horizontal operations; k and
// v are read where they lie; and the causal diagonal cuts whole vectors off the rows.
#pragma once
#include "cpu/attention.h"
#include "cpu/block_gemm.h"
#include "cpu/philox_vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int64_t kQueries = 64, kStrip = 16;

template <class T> constexpr bool kInPairs = kPerUnit<Unit<T>> == 2;

// Takes aligned pieces off a block of memory; of none at all, to learn the size.
class Workspace {
public:
  explicit Workspace(void *memory) : memory_(static_cast<char *>(memory)) {}
  template <class T> T *take(int64_t count) {
    T *piece = memory_ == nullptr ? nullptr : reinterpret_cast<T *>(memory_ + size_);
    size_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
  size_t size() const { return size_; }

private:
  char *memory_;
  size_t size_ = 0;
};

// One head of one sequence.
struct Head {
  int64_t sequence, head;
  int64_t T, S;    // its queries and keys
  int64_t visible; // keys that key_lengths leaves
  int64_t first_q, first_k;
  int64_t shift; // query t sees key s if s <= t + shift

  Head(const AttentionArgs &args, int64_t task) : sequence(task / args.H), head(task % args.H) {
    T = args.T;
    S = args.S;
    first_q = first_k = 0;
    if (args.cu_seqlens_q != nullptr) {
      first_q = args.cu_seqlens_q[sequence];
      first_k = args.cu_seqlens_k[sequence];
      T = args.cu_seqlens_q[sequence + 1] - first_q;
      S = args.cu_seqlens_k[sequence + 1] - first_k;
    }
    visible = S;
    if (args.key_lengths != nullptr) {
      const int64_t length = args.key_lengths[sequence];
      visible = length < 0 ? 0 : length < S ? length : S;
    }
    shift = args.causal ? S - T : S; // S hides nothing
  }

  template <class T, class Pointer> T *at(const AttentionOperand<Pointer> &x, int64_t token) const {
    return static_cast<T *>(x.data) + sequence * x.batch_stride + token * x.token_stride +
           head * x.head_stride;
  }
  float *lse(const AttentionArgs &args) const {
    return args.lse + sequence * args.lse_batch_stride + head * args.lse_head_stride + first_q;
  }
  // The dropout row of query t, and from one query to the next.
  uint32_t dropout_row(const AttentionArgs &args, int64_t t) const {
    const int64_t token = (args.cu_seqlens_q != nullptr ? first_q : sequence * args.T) + t;
    return static_cast<uint32_t>(token * args.H + head);
  }
  int64_t block_of_queries() const {
    const int64_t blocks = (T + kQueries - 1) / kQueries;
    return blocks == 0 ? kQueries : round_up((T + blocks - 1) / blocks, kLanes);
  }
};

// Keys [k0, k0 + keys) against queries [q0, q0 + queries) of a head.
struct Tile {
  int64_t k0, keys, q0, queries, shift;
  int64_t vectors, width; // of a row

  Tile(const Head &head, int64_t q0, int64_t queries)
      : k0(0), keys(0), q0(q0), queries(queries), shift(head.shift),
        vectors((queries + kLanes - 1) / kLanes), width(vectors * kLanes) {}

  static int64_t clamp(int64_t n, int64_t top) { return n < 0 ? 0 : n < top ? n : top; }

  // Keys, from the front, that some query or every query of the tile sees.
  static int64_t seen(const Head &head, int64_t q0, int64_t queries) {
    return clamp(q0 + queries + head.shift, head.visible);
  }
  int64_t seen_by_all() const { return clamp(q0 + shift + 1 - k0, keys); }
  // Keys, from the front, that some query of vector v sees.
  int64_t seen_by(int64_t v) const { return clamp(q0 + (v + 1) * kLanes + shift - k0, keys); }
  // The first vector of queries that sees a key at all.
  int64_t first_vector(int64_t key) const {
    return clamp((k0 + key - shift - q0) / kLanes, vectors);
  }
  // Which queries of vector v see a key.
  IntVec sees(int64_t v, int64_t key) const {
    const int32_t first = static_cast<int32_t>(q0 + v * kLanes + shift - k0 - key);
    return lane_numbers() >= -(first - IntVec{});
  }

  // Calls f(begin, end, first vector) for ranges of keys: one that all queries see, then strips
  // along the diagonal.
  template <class F> FASTFORMER_INLINE void strips(const F &f) const {
    const int64_t diagonal = seen_by_all() / kStrip * kStrip;
    const int64_t whole = seen_by_all() == keys ? keys : diagonal;
    if (whole > 0)
      f(int64_t{0}, whole, int64_t{0});
    for (int64_t key = whole; key < keys; key += kStrip)
      f(key, key + kStrip < keys ? key + kStrip : keys, first_vector(key));
  }
};

// tile[key][query] = the product of row `key` of `a` and column `query` of the packed `b`.
template <class U>
void multiply_tile_rows(const Tile &tile, const U *a, int64_t a_row, const U *b, int64_t depth,
                        float *out) {
  tile.strips([&](int64_t begin, int64_t end, int64_t v0) {
    const Sums to = {out + begin * tile.width + v0 * kLanes, tile.width, false};
    const Product<U> product = {a + begin * a_row, a_row, 1,    b + v0 * kLanes,
                                tile.width,        to,    depth};
    multiply(product, end - begin, tile.vectors - v0);
  });
}

// out (queries x columns) += weights^T b, with weights (keys x queries) packed as units along the
// keys, and b (keys x columns) too.
template <class U>
void multiply_by_weights(const Tile &tile, const U *weights, const U *b, int64_t columns,
                         bool accumulate, float *out) {
  Product<U> product = {weights, 1, tile.width, b, columns, {out, columns, accumulate}, 0};
  const auto depth = [](int64_t keys) { return (keys + kPerUnit<U> - 1) / kPerUnit<U>; };
  if (tile.seen_by_all() == tile.keys) {
    product.depth = depth(tile.keys);
    return multiply(product, tile.queries, columns / kLanes);
  }
  for (int64_t v = 0; v < tile.vectors; ++v) {
    const int64_t rows = tile.queries - v * kLanes < kLanes ? tile.queries - v * kLanes : kLanes;
    product.depth = depth(tile.seen_by(v));
    multiply(product, rows, columns / kLanes);
    product.a += kLanes;
    product.to.advance(kLanes, 0);
  }
}

// What scores are multiplied by, natural and in base 2, and what q is multiplied by so that this is
// positive.
struct Exponent {
  float natural, base2, sign;
  explicit Exponent(float scale)
      : natural(scale == 0.0f  ? 1.0f
                : scale < 0.0f ? -scale
                               : scale),
        base2(natural * kLog2e), sign(scale == 0.0f  ? 0.0f
                                      : scale < 0.0f ? -1.0f
                                                     : 1.0f) {}
};

template <class T> constexpr int kExpDegree = sizeof(T) == 2 ? 4 : 5;

#if defined(__AVX512BF16__)
alignas(64) constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                  21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                  11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

FASTFORMER_INLINE void store_pairs(Pair *out, Vec low, Vec high) {
  const __m512i both = bits<__m512i>(_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
}
#endif

// The masks of eight keys for a vector of queries.
struct KeepEight {
  UintVec words[4];
  FASTFORMER_INLINE IntVec key(int k, uint32_t threshold) const {
    const IntVec lane = bits<IntVec>((words[k / 2] >> (16 * (k % 2))) & 0xffff);
    return lane >= static_cast<int32_t>(threshold);
  }
};

// Rows first_row, first_row + row_step, ...; columns from 8 * col_group on.
FASTFORMER_INLINE KeepEight draw_eight(const Dropout &dropout, uint32_t first_row,
                                       uint32_t row_step, uint32_t col_group) {
  KeepEight keep;
#if defined(__AVX2__)
  static_assert(kDraws == kLanes, "a vector of counters makes a vector of draws");
  UintVec pairs; // 64-bit lanes with the row of an even query in their lower half
  for (int i = 0; i < kLanes; ++i)
    pairs[i] = i % 2 == 0 ? static_cast<uint32_t>(i) : 0;
  const UintVec rows = pairs * row_step + first_row;
  const Words c0 = broadcast(col_group), c2 = broadcast(static_cast<uint32_t>(dropout.stream)),
              c3 = broadcast(static_cast<uint32_t>(dropout.stream >> 32));
  const Draws even = philox(dropout.seed, {{c0, bits<Words>(rows), c2, c3}});
  const Draws odd = philox(dropout.seed, {{c0, bits<Words>(rows + row_step), c2, c3}});
  for (int j = 0; j < 4; ++j)
    keep.words[j] = bits<UintVec>(interleave(even.w[j], odd.w[j]));
#else
  for (int i = 0; i < kLanes; ++i) {
    const PhiloxWords draw = dropout_draw(
        dropout.seed, dropout.stream, first_row + static_cast<uint32_t>(i) * row_step, col_group);
    for (int j = 0; j < 4; ++j)
      keep.words[j][i] = draw.w[j];
  }
#endif
  return keep;
}

} // namespace
} // namespace fastformer::cpu::FASTFORMER_ISA
