// Attention over cached keys and values, for any instruction set S of simd_*.h.
//
// First all scores, then their weights exp(score - top), then the values times those. Positions are
// taken a tile at a time, so that what several groups of queries read comes from memory once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/vector_math.h"
#include "lowmoe/kernels/cpu/vector_rows.h"

namespace lowmoe::vector {

inline constexpr size_t kTilePositions = 64;  // of 256 bytes, at head size 128 in float16: 16 KiB

// Query rows that share what is loaded; as many sums remain for each as registers of its head.
inline constexpr size_t kQueriesAtOnce = 4;

// Products of kQueries queries and kRows keys, kLanes of each from i on: sums[query][row] are begun
// with them (a loop of zeros would become a call of memset, and the sums leave their registers) or
// have them added.
template <class S, bool kBegin, size_t kQueries, size_t kRows, class Stored, class Load>
void multiply_lanes(typename S::Float (&sums)[kQueries * kRows], const float* q, size_t size,
                    const Stored* const (&rows)[kRows], size_t i, Load load) {
  typename S::Float key[kRows];
  for (size_t r = 0; r < kRows; r++) key[r] = load(rows[r] + i);
  for (size_t k = 0; k < kQueries; k++) {
    const auto query = load(q + k * size + i);
    for (size_t r = 0; r < kRows; r++) {
      auto& sum = sums[k * kRows + r];
      sum = kBegin ? query * key[r] : S::fma(query, key[r], sum);
    }
  }
}

// scores[query][row] of kQueries queries and kRows rows from `position` on, or the first n of them.
// kWholeHead says that a head fills registers.
template <class S, size_t kQueries, size_t kRows, bool kWholeHead, bool kWholeRows, class Stored>
void score_rows(const float* q, const CachedRows<Stored>& keys, size_t position, size_t n,
                float* scores, size_t score_stride) {
  const RowPointers<kRows, kWholeRows, Stored> rows(keys, position, n);
  const auto load = [](auto* from) { return S::load(from); };
  const size_t size = keys.size, whole = size / S::kLanes * S::kLanes;
  typename S::Float sums[kQueries * kRows];
  size_t i = 0;
  if constexpr (kWholeHead) {
    multiply_lanes<S, true, kQueries>(sums, q, size, rows.at, 0, load);
    i = S::kLanes;
  } else {
    const auto load_some = [=](auto* from) { return S::load_some(from, size - whole); };
    multiply_lanes<S, true, kQueries>(sums, q, size, rows.at, whole, load_some);
  }
  for (; i < whole; i += S::kLanes) {
    multiply_lanes<S, false, kQueries>(sums, q, size, rows.at, i, load);
  }
  float found[kQueries * kRows];
  for (size_t k = 0; k < kQueries * kRows; k += S::kLanes) {
    S::store(found + k, S::sum_each(sums + k));
  }
  const size_t n_rows = kWholeRows ? kRows : n;
  if constexpr (CachedRows<Stored>::kScaled) {
    for (size_t r = 0; r < n_rows; r++) {
      const float scale = keys.scale(position + r);
      for (size_t k = 0; k < kQueries; k++) found[k * kRows + r] *= scale;
    }
  }
  for (size_t k = 0; k < kQueries; k++) {
    std::memcpy(scores + k * score_stride, found + k * kRows, n_rows * sizeof *found);
  }
}

// The same for n rows; with `prefetch` those further on are asked for.
template <class S, size_t kQueries, bool kWholeHead, class Stored>
void score_tile(const float* q, const CachedRows<Stored>& keys, size_t position, size_t n,
                float* scores, size_t score_stride, bool prefetch) {
  constexpr size_t kRows = S::kSums / kQueries;
  for (size_t i = 0; i < n; i += kRows) {
    for (size_t r = 0; prefetch && r < kRows; r++) {
      keys.prefetch(position + i + kAhead + r, 0, keys.size);
    }
    if (i + kRows <= n) {
      score_rows<S, kQueries, kRows, kWholeHead, true>(q, keys, position + i, kRows, scores + i,
                                                       score_stride);
    } else {
      score_rows<S, kQueries, kRows, kWholeHead, false>(q, keys, position + i, n - i, scores + i,
                                                        score_stride);
    }
  }
}

// Weights of some queries at some positions.
struct Weights {
  const float* of_zero;
  size_t query_stride, position_stride;

  float at(size_t query, size_t position) const {
    return of_zero[query * query_stride + position * position_stride];
  }
};

// out[query][i..] += the sum over n positions of weight * value, for kQueries
// queries and kVectors registers of the head, or, where load takes some, part of one.
template <class S, size_t kQueries, size_t kVectors, class Stored, class Load, class Store>
void add_values(const Weights& weights, const CachedRows<Stored>& values, size_t position, size_t n,
                size_t i, float* out, bool prefetch, Load load, Store store) {
  typename S::Float sums[kQueries * kVectors], value[kVectors];
  const auto place = [&](size_t k, size_t v) { return out + k * values.size + i + v * S::kLanes; };
  for (size_t k = 0; k < kQueries; k++) {
    for (size_t v = 0; v < kVectors; v++) sums[k * kVectors + v] = load(place(k, v));
  }
  for (size_t p = 0; p < n; p++) {
    const Stored* row = values.at(position + p) + i;
    if (prefetch) values.prefetch(position + p + kAhead, i, kVectors * S::kLanes);
    for (size_t v = 0; v < kVectors; v++) value[v] = load(row + v * S::kLanes);
    for (size_t k = 0; k < kQueries; k++) {
      const auto weight = S::all(weights.at(k, p));
      for (size_t v = 0; v < kVectors; v++) {
        sums[k * kVectors + v] = S::fma(weight, value[v], sums[k * kVectors + v]);
      }
    }
  }
  for (size_t k = 0; k < kQueries; k++) {
    for (size_t v = 0; v < kVectors; v++) store(place(k, v), sums[k * kVectors + v]);
  }
}

// The same for whole heads.
template <class S, size_t kQueries, class Stored>
void add_heads(const Weights& weights, const CachedRows<Stored>& values, size_t position, size_t n,
               float* out, bool prefetch) {
  const size_t whole = values.size / S::kLanes;
  in_steps<S::kSums / kQueries>(0, whole, [&]<size_t kVectors>(size_t v) {
    add_values<S, kQueries, kVectors>(
        weights, values, position, n, v * S::kLanes, out, prefetch,
        [](auto* from) { return S::load(from); }, [](float* to, auto x) { S::store(to, x); });
  });
  const size_t rest = values.size - whole * S::kLanes;
  if (rest == 0) return;
  add_values<S, kQueries, 1>(
      weights, values, position, n, whole * S::kLanes, out, prefetch,
      [=](auto* from) { return S::load_some(from, rest); },
      [=](float* to, auto x) { S::store_some(to, x, rest); });
}

// The largest of n >= 1 numbers.
template <class S>
float largest(const float* x, size_t n) {
  auto found = S::all(x[0]);
  size_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) found = S::max(found, S::load(x + i));
  float most = S::largest(found);
  for (; i < n; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// scores become exp(score - top); returns their sum.
template <class S>
float weigh(float* scores, size_t n, float top) {
  auto sum = S::all(0);
  const auto weight = [=](auto score) { return exp<S>(score - S::all(top)); };
  size_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) {
    const auto found = weight(S::load(scores + i));
    S::store(scores + i, found);
    sum = sum + found;
  }
  float rest[S::kLanes] = {};
  if (i < n) {
    S::store_some(scores + i, weight(S::load_some(scores + i, n - i)), n - i);
    std::memcpy(rest, scores + i, (n - i) * sizeof *rest);
  }
  return S::sum(sum + S::load(rest));
}

template <class S, class Stored>
void attend_rows(const float* q, size_t n_queries, const CachedRows<Stored>& keys,
                 const CachedRows<Stored>& values, size_t first, size_t last, float* top,
                 float* total, float* out, float* scratch) {
  const size_t n = last - first, size = keys.size;
  const auto each_tile = [n](auto&& f) {
    for (size_t i = 0; i < n; i += kTilePositions) {
      f(i, n - i < kTilePositions ? n - i : kTilePositions);
    }
  };
  each_tile([&](size_t from, size_t count) {
    in_steps<kQueriesAtOnce>(0, n_queries, [&]<size_t kQueries>(size_t query) {
      float* scores = scratch + query * n + from;
      if (size % S::kLanes == 0) {
        score_tile<S, kQueries, true>(q + query * size, keys, first + from, count, scores, n,
                                      query == 0);
      } else {
        score_tile<S, kQueries, false>(q + query * size, keys, first + from, count, scores, n,
                                       query == 0);
      }
    });
  });
  for (size_t k = 0; k < n_queries; k++) {
    top[k] = largest<S>(scratch + k * n, n);
    total[k] = weigh<S>(scratch + k * n, n, top[k]);
  }
  std::memset(out, 0, n_queries * size * sizeof *out);
  each_tile([&](size_t from, size_t count) {
    if constexpr (CachedRows<Stored>::kScaled) {
      for (size_t i = from; i < from + count; i++) {
        const float scale = values.scale(first + i);
        for (size_t k = 0; k < n_queries; k++) scratch[k * n + i] *= scale;
      }
    }
    in_steps<kQueriesAtOnce>(0, n_queries, [&]<size_t kQueries>(size_t query) {
      add_heads<S, kQueries>({scratch + query * n + from, n, 1}, values, first + from, count,
                             out + query * size, query == 0);
    });
  });
}

template <class S>
void attend_part(KvFormat format, const float* q, size_t n_queries, const uint8_t* keys,
                 const uint8_t* values, size_t stride, size_t size, size_t first, size_t last,
                 float* top, float* total, float* out, float* scratch) {
  if (first == last) {
    for (size_t k = 0; k < n_queries; k++) {
      top[k] = -std::numeric_limits<float>::infinity();
      total[k] = 0;
    }
    std::memset(out, 0, n_queries * size * sizeof *out);
    return;
  }
  const auto attend = [&]<class Stored>(Stored) {
    attend_rows<S>(q, n_queries, CachedRows<Stored>{keys, stride, size},
                   CachedRows<Stored>{values, stride, size}, first, last, top, total, out, scratch);
  };
  if (format == KvFormat::kFloat32) attend(float{});
  if (format == KvFormat::kFloat16) attend(uint16_t{});
  if (format == KvFormat::kInt8) attend(int8_t{});
}

// Products with rows are scores of keys that lie the same way.
template <class S>
void multiply_rows(const float* x, size_t n, const uint8_t* rows, size_t stride, size_t size,
                   size_t n_rows, float* y, size_t y_stride) {
  const CachedRows<int8_t> of{rows, stride, size};
  in_steps<kQueriesAtOnce>(0, n, [&]<size_t kTokens>(size_t t) {
    float* to = y + t * y_stride;
    if (size % S::kLanes == 0) {
      score_tile<S, kTokens, true>(x + t * size, of, 0, n_rows, to, y_stride, true);
    } else {
      score_tile<S, kTokens, false>(x + t * size, of, 0, n_rows, to, y_stride, true);
    }
  });
}

}  // namespace lowmoe::vector
