// Attention backward: one pass over the tiles of a head. Scores are computed again and turned into
// weights by the log-sum-exp of forward, and the three gradients are accumulated in float32 (Dao et
// al., "FlashAttention", 2022, appendix B).
#include "cpu/attention_tile.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

constexpr int64_t kKeys = 128;

template <class T> struct Buffers {
  using U = Unit<T>;
  static constexpr bool kCopy = !kInPairs<T> && sizeof(T) == 2;

  float *k, *v;          // (S, D), only where they cannot be read in place
  U *k_rows;             // (S units, columns)
  U *q, *grad, *out;     // (D units, queries)
  U *q_rows, *grad_rows; // (queries units, columns)
  float *s, *dp;         // (keys, queries): scores and gradients of the weights
  bf16 *p, *ds;          // the same in bf16, queries in pairs ...
  U *ds_pairs;           // ... and keys in pairs
  float *dq, *dk, *dv;   // (queries, columns), (S, columns), (S, columns)
  float *lse, *delta;
  int64_t columns;

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
    const int64_t S = round_up(args.S, 2);
    k = kCopy ? w.take<float>(S * args.D + kLanes) : nullptr;
    v = kCopy ? w.take<float>(S * args.D + kLanes) : nullptr;
    k_rows = w.take<U>(S / kPerUnit<U> * columns);
    q = w.take<U>(args.D / kPerUnit<U> * kQueries);
    grad = w.take<U>(args.D / kPerUnit<U> * kQueries);
    out = w.take<U>(args.D / kPerUnit<U> * kQueries);
    q_rows = w.take<U>(kQueries / kPerUnit<U> * columns);
    grad_rows = w.take<U>(kQueries / kPerUnit<U> * columns);
    s = w.take<float>(kKeys * kQueries);
    dp = w.take<float>(kKeys * kQueries);
    p = kInPairs<T> ? w.take<bf16>(kKeys * kQueries) : nullptr;
    ds = kInPairs<T> ? w.take<bf16>(kKeys * kQueries) : nullptr;
    ds_pairs = kInPairs<T> ? w.take<U>(kKeys / 2 * kQueries) : nullptr;
    dq = w.take<float>(kQueries * columns);
    dk = w.take<float>(S * columns);
    dv = w.take<float>(S * columns);
    lse = w.take<float>(kQueries);
    delta = w.take<float>(kQueries);
    return w.size();
  }
};

// The weight of a scaled score minus lse. Base 2 is cheaper, but lse has to be rounded to it, which
// float32 would show.
template <class T> FASTFORMER_INLINE Vec weight_of(Vec x) {
  return sizeof(T) == 2 ? exp2<kExpDegree<T>>(x) : exp(x);
}
template <class T> constexpr float kLseUnit = sizeof(T) == 2 ? kLog2e : 1.0f;

// lse of a block of queries, in the base of weight_of.
template <class T> void load_lse(const float *lse, const Tile &tile, const Buffers<T> &b) {
  for (int64_t i = 0; i < tile.width; ++i) {
    // A query that sees nothing has -inf; all its weights are masked.
    const bool real = i < tile.queries && lse[i] > -1e38f;
    b.lse[i] = real ? lse[i] * kLseUnit<T> : 0.0f;
  }
}

// delta = sum(grad * out), which equals the sum of weights times their gradients. It is summed in
// the order of the products with v, so that a query with one key gets a gradient of exactly 0.
template <class T>
void sum_delta(const T *out, int64_t stride, int64_t D, const Tile &tile, const Buffers<T> &b) {
  pack_columns(out, stride, tile.queries, D, 1.0f, b.out, tile.width);
  for (int64_t i = 0; i < tile.width; i += kLanes) {
    Vec delta = zero();
    for (int64_t u = 0; u < D / kPerUnit<Unit<T>>; ++u)
      delta = multiply_add(delta, load_units(b.grad + u * tile.width + i),
                           load_units(b.out + u * tile.width + i));
    store(b.delta + i, delta);
  }
}

// Weights and their gradients for vector v of a tile, from scores and products with v. Where the
// tile holds all keys, delta is summed from them: in bfloat16 that is closer than from out.
template <class T, bool kDropout>
void differentiate_vector(const AttentionArgs &args, const Head &head, const Tile &tile, int64_t v,
                          float factor, bool all_keys, const Buffers<T> &b) {
  const int64_t seen = tile.seen_by(v), whole = Tile::clamp(tile.seen_by_all(), seen);
  const int64_t width = tile.width, at = v * kLanes;
  float *s = b.s + at, *gradient = b.dp + at;
  const Vec lse = load(b.lse + at), f = splat(factor);
  KeepEight keep;
  const uint32_t row = kDropout ? head.dropout_row(args, tile.q0 + at) : 0;
  const uint32_t step = static_cast<uint32_t>(args.H);
  const auto draw = [&](int64_t key) {
    if (kDropout && key % 8 == 0)
      keep = draw_eight(args.dropout, row, step, static_cast<uint32_t>((tile.k0 + key) / 8));
  };
  const auto dropped = [&](int64_t key, Vec x) {
    if (!kDropout)
      return x;
    const IntVec kept = keep.key(static_cast<int>(key % 8), args.dropout.threshold);
    return keep_where(kept, x * args.dropout.scale);
  };
  const auto weight = [&](int64_t key) {
    const Vec p = weight_of<T>(fma(load(s + key * width), f, -lse));
    return key < whole ? p : keep_where(tile.sees(v, key), p);
  };
  Vec delta;
  if (all_keys) {
    Vec sums[2] = {zero(), zero()}, weights[2] = {zero(), zero()};
    for (int64_t j = 0; j < seen; ++j) {
      draw(j);
      const Vec p = weight(j), dp = dropped(j, load(gradient + j * width));
      store(s + j * width, p);
      if (kDropout)
        store(gradient + j * width, dp);
      sums[j % 2] = fma(p, dp, sums[j % 2]);
      weights[j % 2] += p;
    }
    // The weights add up to 1 but for the rounding of lse, which must not look like a gradient.
    delta = (sums[0] + sums[1]) / max(weights[0] + weights[1], splat(1e-30f));
  } else {
    delta = load(b.delta + at);
  }
  const auto one = [&](int64_t key, Vec &p, Vec &ds) {
    p = all_keys ? load(s + key * width) : weight(key);
    Vec dp = load(gradient + key * width);
    if (kDropout && !all_keys)
      dp = dropped(key, dp);
    ds = p * (dp - delta);
    p = dropped(key, p);
  };
  for (int64_t j = 0; j < seen; j += 2) {
    draw(j);
    const int64_t here = j * width, next = here + width;
    Vec p0, p1 = zero(), ds0, ds1 = zero();
    one(j, p0, ds0);
    const bool both = j + 1 < seen;
    if (both)
      one(j + 1, p1, ds1);
    if constexpr (kInPairs<T>) {
      store(b.p + at + here, p0);
      store(b.ds + at + here, ds0);
      if (both) {
        store(b.p + at + next, p1);
        store(b.ds + at + next, ds1);
      }
      store_pairs(b.ds_pairs + at + j / 2 * width, ds0, ds1);
    } else {
      store(s + here, p0);
      store(gradient + here, ds0);
      if (both) {
        store(s + next, p1);
        store(gradient + next, ds1);
      }
    }
  }
  // The rest of the strip is multiplied too.
  const int64_t strip_end = Tile::clamp(round_up(seen, kStrip), tile.keys);
  for (int64_t j = seen; j < strip_end; ++j)
    if constexpr (kInPairs<T>) {
      store(b.p + at + j * width, zero());
      store(b.ds + at + j * width, zero());
    } else {
      store(s + j * width, zero());
      store(gradient + j * width, zero());
    }
}

// out (keys x columns) += tile * rows, with the tile's queries summed over.
template <class U>
void multiply_tile_by(const Tile &tile, const U *a, const U *rows, int64_t columns, float *out) {
  const int64_t a_row = tile.width / kPerUnit<U>;
  const int64_t depth = (tile.queries + kPerUnit<U> - 1) / kPerUnit<U>;
  tile.strips([&](int64_t begin, int64_t end, int64_t v0) {
    const int64_t skip = v0 * kLanes / kPerUnit<U>;
    if (skip >= depth)
      return;
    const Product<U> product = {a + begin * a_row + skip,
                                a_row,
                                1,
                                rows + skip * columns,
                                columns,
                                {out + begin * columns, columns, true},
                                depth - skip};
    multiply(product, end - begin, columns / kLanes);
  });
}

template <class T>
void write_rows(T *out, int64_t stride, const float *rows, int64_t columns, int64_t count,
                int64_t D, float factor) {
  for (int64_t i = 0; i < count; ++i, out += stride, rows += columns) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes)
      store(out + d, load(rows + d) * factor);
    if (d < D)
      store(out + d, load(rows + d) * factor, D - d);
  }
}

template <class T> void run(const AttentionArgs &args, int64_t task, void *memory) {
  using U = Unit<T>;
  const Head head(args, task);
  const Exponent exponent(args.scale);
  const float factor = exponent.natural * kLseUnit<T>;
  const Buffers<T> b(args, memory);
  const int64_t units = args.D / kPerUnit<U>, columns = b.columns;
  const T *k_src = head.at<const T>(args.k, head.first_k);
  const T *v_src = head.at<const T>(args.v, head.first_k);
  const U *k, *v;
  int64_t k_row, v_row;
  if constexpr (Buffers<T>::kCopy) {
    pack_rows(k_src, args.k.token_stride, head.visible, args.D, b.k, args.D);
    pack_rows(v_src, args.v.token_stride, head.visible, args.D, b.v, args.D);
    k = b.k, v = b.v;
    k_row = v_row = args.D;
  } else {
    k = reinterpret_cast<const U *>(k_src), v = reinterpret_cast<const U *>(v_src);
    k_row = args.k.token_stride / kPerUnit<U>;
    v_row = args.v.token_stride / kPerUnit<U>;
  }
  pack_rows(k_src, args.k.token_stride, head.visible, args.D, b.k_rows, columns);
  for (int64_t i = 0; i < head.S * columns; i += kLanes) {
    store(b.dk + i, zero());
    store(b.dv + i, zero());
  }
  const int64_t step = head.block_of_queries();
  for (int64_t q0 = 0; q0 < head.T; q0 += step) {
    Tile tile(head, q0, step < head.T - q0 ? step : head.T - q0);
    const int64_t token = head.first_q + q0;
    const T *q_src = head.at<const T>(args.q, token);
    const T *grad_src = head.at<const T>(args.grad, token);
    const int64_t end = Tile::seen(head, q0, tile.queries);
    T *grad_q = head.at<T>(args.grad_q, token);
    if (end == 0) {
      for (int64_t i = 0; i < tile.queries * columns; i += kLanes)
        store(b.dq + i, zero());
      write_rows(grad_q, args.grad_q.token_stride, b.dq, columns, tile.queries, args.D, 0.0f);
      continue;
    }
    pack_columns(q_src, args.q.token_stride, tile.queries, args.D, exponent.sign, b.q, tile.width);
    pack_columns(grad_src, args.grad.token_stride, tile.queries, args.D, 1.0f, b.grad, tile.width);
    load_lse(head.lse(args) + q0, tile, b);
    const bool all_keys = end <= kKeys;
    if (!all_keys)
      sum_delta(head.at<const T>(args.saved_out, token), args.saved_out.token_stride, args.D, tile,
                b);
    pack_rows(q_src, args.q.token_stride, tile.queries, args.D, b.q_rows, columns);
    pack_rows(grad_src, args.grad.token_stride, tile.queries, args.D, b.grad_rows, columns);
    for (tile.k0 = 0; tile.k0 < end; tile.k0 += kKeys) {
      tile.keys = kKeys < end - tile.k0 ? kKeys : end - tile.k0;
      multiply_tile_rows(tile, k + tile.k0 * k_row, k_row, b.q, units, b.s);
      multiply_tile_rows(tile, v + tile.k0 * v_row, v_row, b.grad, units, b.dp);
      for (int64_t i = 0; i < tile.vectors; ++i)
        if (args.dropout.threshold != 0)
          differentiate_vector<T, true>(args, head, tile, i, factor, all_keys, b);
        else
          differentiate_vector<T, false>(args, head, tile, i, factor, all_keys, b);
      const U *p, *ds, *ds_by_query;
      if constexpr (kInPairs<T>) {
        p = reinterpret_cast<const U *>(b.p), ds = reinterpret_cast<const U *>(b.ds);
        ds_by_query = b.ds_pairs;
      } else {
        p = b.s, ds = b.dp, ds_by_query = b.dp;
      }
      multiply_tile_by(tile, p, b.grad_rows, columns, b.dv + tile.k0 * columns);
      multiply_tile_by(tile, ds, b.q_rows, columns, b.dk + tile.k0 * columns);
      multiply_by_weights(tile, ds_by_query, b.k_rows + tile.k0 / kPerUnit<U> * columns, columns,
                          tile.k0 > 0, b.dq);
    }
    write_rows(grad_q, args.grad_q.token_stride, b.dq, columns, tile.queries, args.D, args.scale);
  }
  write_rows(head.at<T>(args.grad_k, head.first_k), args.grad_k.token_stride, b.dk, columns, head.S,
             args.D, args.scale);
  write_rows(head.at<T>(args.grad_v, head.first_k), args.grad_v.token_stride, b.dv, columns, head.S,
             args.D, 1.0f);
}

size_t attention_workspace(const AttentionArgs &args) {
  return args.bf16 ? Buffers<bf16>::bytes(args) : Buffers<float>::bytes(args);
}

void attention(const AttentionArgs &args, int64_t task, void *workspace) {
  args.bf16 ? run<bf16>(args, task, workspace) : run<float>(args, task, workspace);
}

} // namespace

extern const AttentionBackwardKernels attention_bwd_kernels;
const AttentionBackwardKernels attention_bwd_kernels = {attention_workspace, attention};

} // namespace fastformer::cpu::FASTFORMER_ISA
