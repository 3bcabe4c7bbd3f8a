// Attention forward: blocks of keys with an online softmax (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022, section 3.1).
#include "cpu/attention_tile.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int64_t kKeys = 128;
// Below any score, so that a query that has seen no key yet has a maximum to subtract.
constexpr float kLowest = -1e20f;

template <class T> struct Buffers {
  using U = Unit<T>;
  float *k; // (S, D), only where k cannot be read in place
  U *v;     // (S units, columns)
  U *q;     // (D units, queries)
  float *s; // (keys, queries)
  U *p;     // (keys units, queries); s itself where a unit is a float
  float *o; // (queries, columns)
  float *m, *l;
  int64_t columns;

  static constexpr bool kCopyK = !kInPairs<T> && sizeof(T) == 2;

  Buffers(const AttentionArgs &args, void *memory) { layout(args, memory); }
  static size_t bytes(const AttentionArgs &args) {
    Buffers<T> b;
    return b.layout(args, nullptr);
  }

private:
  Buffers() = default;
  size_t layout(const AttentionArgs &args, void *memory) {
    Workspace w(memory);
    columns = round_up(args.D, kLanes);
    k = kCopyK ? w.take<float>(args.S * args.D + kLanes) : nullptr;
    v = w.take<U>(round_up(args.S, 2) / kPerUnit<U> * columns);
    q = w.take<U>(args.D / kPerUnit<U> * kQueries);
    s = w.take<float>(kKeys * kQueries);
    p = kInPairs<T> ? w.take<U>(kKeys / 2 * kQueries) : nullptr;
    o = w.take<float>(kQueries * columns);
    m = w.take<float>(kQueries);
    l = w.take<float>(kQueries);
    return w.size();
  }
};

// Turns the scores of vector v into weights relative to the new maxima, and packs them.
template <class T, bool kDropout>
void softmax_vector(const AttentionArgs &args, const Head &head, const Tile &tile, int64_t v,
                    float factor, const Buffers<T> &b) {
  float *s = b.s + v * kLanes;
  const int64_t seen = tile.seen_by(v), whole = Tile::clamp(tile.seen_by_all(), seen);
  const int64_t width = tile.width;
  for (int64_t j = whole; j < seen; ++j)
    store(s + j * width, tile.sees(v, j) ? load(s + j * width) : splat(-1e30f));
  Vec top[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
  int64_t j = 0;
  for (; j + 4 <= seen; j += 4)
    for (int i = 0; i < 4; ++i)
      top[i] = max(top[i], load(s + (j + i) * width));
  for (; j < seen; ++j)
    top[0] = max(top[0], load(s + j * width));
  const Vec before = load(b.m + v * kLanes);
  const Vec m = max(max(max(top[0], top[1]), max(top[2], top[3])), before);
  store(b.m + v * kLanes, m);
  if (tile.k0 > 0) {
    alignas(64) float rescale[kLanes];
    const Vec alpha = exp2((before - m) * factor);
    store(rescale, alpha);
    store(b.l + v * kLanes, load(b.l + v * kLanes) * alpha);
    for (int i = 0; i < kLanes && v * kLanes + i < tile.queries; ++i) {
      float *row = b.o + (v * kLanes + i) * b.columns;
      for (int64_t d = 0; d < b.columns; d += kLanes)
        store(row + d, load(row + d) * rescale[i]);
    }
  }
  const Vec mf = m * factor, f = splat(factor);
  Vec l[2] = {load(b.l + v * kLanes), zero()};
  KeepEight keep;
  const uint32_t row = kDropout ? head.dropout_row(args, tile.q0 + v * kLanes) : 0;
  const uint32_t step = static_cast<uint32_t>(args.H);
  const auto weight = [&](int64_t key, Vec &sum) {
    Vec p = exp2<kExpDegree<T>>(fma(load(s + key * width), f, -mf));
    if (key >= whole) // not every exp2 reaches 0
      p = keep_where(tile.sees(v, key), p);
    sum += p;
    if (!kDropout)
      return p;
    return keep_where(keep.key(static_cast<int>(key % 8), args.dropout.threshold), p);
  };
  for (j = 0; j < seen; j += 2) {
    if (kDropout && j % 8 == 0)
      keep = draw_eight(args.dropout, row, step, static_cast<uint32_t>((tile.k0 + j) / 8));
    const Vec p0 = weight(j, l[0]), p1 = j + 1 < seen ? weight(j + 1, l[1]) : zero();
    if constexpr (kInPairs<T>) {
      store_pairs(b.p + j / 2 * width + v * kLanes, p0, p1);
    } else {
      store(s + j * width, p0);
      if (j + 1 < seen)
        store(s + (j + 1) * width, p1);
    }
  }
  store(b.l + v * kLanes, l[0] + l[1]);
}

template <class T>
void finish(const AttentionArgs &args, const Head &head, const Tile &tile, float scale,
            const Buffers<T> &b) {
  float *lse = head.lse(args) + tile.q0;
  for (int64_t v = 0; v < tile.vectors; ++v) {
    const int64_t first = v * kLanes;
    const int64_t rows = tile.queries - first < kLanes ? tile.queries - first : kLanes;
    const Vec l = load(b.l + first);
    const IntVec empty = l == zero(); // no key seen
    const Vec log = fma(load(b.m + first), splat(scale), log2(l) * kLn2);
    const Vec value = empty ? splat(-__builtin_inff()) : log;
    if (rows == kLanes)
      store(lse + first, value);
    else
      store(lse + first, value, rows);
    alignas(64) float inverse[kLanes];
    store(inverse, empty ? zero() : args.dropout.scale / l);
    for (int64_t i = 0; i < rows; ++i) {
      const float *o = b.o + (first + i) * b.columns;
      T *out = head.at<T>(args.out, head.first_q + tile.q0 + first + i);
      int64_t d = 0;
      for (; d + kLanes <= args.D; d += kLanes)
        store(out + d, load(o + d) * inverse[i]);
      if (d < args.D)
        store(out + d, load(o + d) * inverse[i], args.D - d);
    }
  }
}

template <class T> void run(const AttentionArgs &args, int64_t task, void *memory) {
  using U = Unit<T>;
  const Head head(args, task);
  const Exponent exponent(args.scale);
  const Buffers<T> b(args, memory);
  const int64_t units = args.D / kPerUnit<U>;
  const U *k;
  int64_t k_row;
  if constexpr (Buffers<T>::kCopyK) {
    const T *src = head.at<const T>(args.k, head.first_k);
    pack_rows(src, args.k.token_stride, head.visible, args.D, b.k, args.D);
    k = b.k;
    k_row = args.D;
  } else {
    k = reinterpret_cast<const U *>(head.at<const T>(args.k, head.first_k));
    k_row = args.k.token_stride / kPerUnit<U>;
  }
  pack_rows(head.at<const T>(args.v, head.first_k), args.v.token_stride, head.visible, args.D, b.v,
            b.columns);
  const int64_t step = head.block_of_queries();
  for (int64_t q0 = 0; q0 < head.T; q0 += step) {
    Tile tile(head, q0, step < head.T - q0 ? step : head.T - q0);
    pack_columns(head.at<const T>(args.q, head.first_q + q0), args.q.token_stride, tile.queries,
                 args.D, exponent.sign, b.q, tile.width);
    for (int64_t i = 0; i < tile.width; i += kLanes) {
      store(b.m + i, splat(kLowest));
      store(b.l + i, zero());
    }
    const int64_t end = Tile::seen(head, q0, tile.queries);
    for (tile.k0 = 0; tile.k0 < end; tile.k0 += kKeys) {
      tile.keys = kKeys < end - tile.k0 ? kKeys : end - tile.k0;
      multiply_tile_rows(tile, k + tile.k0 * k_row, k_row, b.q, units, b.s);
      for (int64_t v = 0; v < tile.vectors; ++v)
        if (args.dropout.threshold != 0)
          softmax_vector<T, true>(args, head, tile, v, exponent.base2, b);
        else
          softmax_vector<T, false>(args, head, tile, v, exponent.base2, b);
      const U *v = b.v + tile.k0 / kPerUnit<U> * b.columns;
      const U *p;
      if constexpr (kInPairs<T>)
        p = b.p;
      else
        p = b.s;
      multiply_by_weights(tile, p, v, b.columns, tile.k0 > 0, b.o);
    }
    if (end == 0)
      for (int64_t i = 0; i < tile.queries * b.columns; i += kLanes)
        store(b.o + i, zero());
    finish(args, head, tile, exponent.natural, b);
  }
}

size_t attention_workspace(const AttentionArgs &args) {
  return args.bf16 ? Buffers<bf16>::bytes(args) : Buffers<float>::bytes(args);
}

void attention(const AttentionArgs &args, int64_t task, void *workspace) {
  args.bf16 ? run<bf16>(args, task, workspace) : run<float>(args, task, workspace);
}

} // namespace

extern const AttentionForwardKernels attention_fwd_kernels;
const AttentionForwardKernels attention_fwd_kernels = {attention_workspace, attention};

} // namespace fastformer::cpu::FASTFORMER_ISA
