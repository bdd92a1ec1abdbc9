// Attention of many tokens at once, for any instruction set S of simd_*.h.
//
// Lanes are query rows, a row being one query head of one token: scores come out with the rows of
// one position side by side, so softmax needs no sums across lanes, and keys stay as they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/vector_attention.h"
#include "lowmoe/kernels/cpu/vector_math.h"
#include "lowmoe/kernels/cpu/vector_rows.h"

namespace lowmoe::vector {

// Widens n cached heads: to[n][size].
template <class S, class Stored>
void widen_rows(const CachedRows<Stored>& rows, size_t position, size_t n, float* to) {
  for (size_t r = 0; r < n; r++, to += rows.size) {
    const Stored* row = rows.at(position + r);
    float scale = 1;
    if constexpr (CachedRows<Stored>::kScaled) scale = rows.scale(position + r);
    size_t i = 0;
    for (; i + S::kLanes <= rows.size; i += S::kLanes) {
      S::store(to + i, S::load(row + i) * S::all(scale));
    }
    const size_t rest = rows.size - i;
    if (rest) S::store_some(to + i, S::load_some(row + i, rest) * S::all(scale), rest);
  }
}

// scores[position][row] of kPositions keys, [kPositions][size] floats.
template <class S, size_t kPositions>
void score_block(const float* turned, const float* keys, size_t size, float* scores) {
  constexpr size_t kRows = 2 * S::kLanes;
  typename S::Float low[kPositions], high[kPositions];
  // Begun with products, not with zeros: see multiply_lanes.
  for (size_t p = 0; p < kPositions; p++) {
    low[p] = S::all(keys[p * size]) * S::load(turned);
    high[p] = S::all(keys[p * size]) * S::load(turned + S::kLanes);
  }
  for (size_t i = 1; i < size; i++) {
    const auto a = S::load(turned + i * kRows), b = S::load(turned + i * kRows + S::kLanes);
    for (size_t p = 0; p < kPositions; p++) {
      const auto key = S::all(keys[p * size + i]);
      low[p] = S::fma(key, a, low[p]);
      high[p] = S::fma(key, b, high[p]);
    }
  }
  for (size_t p = 0; p < kPositions; p++) {
    S::store(scores + p * kRows, low[p]);
    S::store(scores + p * kRows + S::kLanes, high[p]);
  }
}

// Scores of n positions become weights; top and total take them in.  factors: [2 kLanes], what the
// output so far is to be multiplied by. Returns whether one of them is not 1.
template <class S>
bool weigh_block(float* scores, size_t n, float* top, float* total, float* factors) {
  constexpr size_t kRows = 2 * S::kLanes;
  // Rows that see none of these positions have -infinity only; from this they can be subtracted.
  const auto lowest = S::all(std::numeric_limits<float>::lowest());
  bool changed = false;
  for (size_t lane = 0; lane < kRows; lane += S::kLanes) {
    const auto old = S::load(top + lane);
    auto most = S::max(lowest, old);
    for (size_t p = 0; p < n; p++) most = S::max(S::load(scores + p * kRows + lane), most);
    const auto factor = exp<S>(old - most);
    auto sum = S::load(total + lane) * factor;
    for (size_t p = 0; p < n; p++) {
      float* at = scores + p * kRows + lane;
      const auto weight = exp<S>(S::load(at) - most);
      S::store(at, weight);
      sum = sum + weight;
    }
    S::store(top + lane, most);
    S::store(total + lane, sum);
    S::store(factors + lane, factor);
  }
  for (size_t row = 0; row < kRows; row++) changed |= factors[row] != 1;
  return changed;
}

template <class S>
void scale_rows(float* out, size_t size, size_t n_rows, const float* factors) {
  for (size_t row = 0; row < n_rows; row++, out += size) {
    each_lanes<S>(size, [=](auto load, auto store, size_t i) {
      store(out + i, load(out + i) * S::all(factors[row]));
    });
  }
}

// turned[row / rows of a group][size][row of the group]: queries with the rows of a group side by
// side; rows that fill up the last group are 0.
template <class S>
void turn_queries(const QueryBlock& queries, size_t size, float* turned) {
  constexpr size_t kRows = 2 * S::kLanes;
  const size_t n_rows = queries.n_tokens * queries.n_queries;
  std::memset(turned, 0, layout::round_up(n_rows, kRows) * size * sizeof *turned);
  for (size_t row = 0; row < n_rows; row++) {
    const size_t token = row / queries.n_queries, query = row % queries.n_queries;
    const float* from = queries.q + token * queries.q_stride + query * size;
    float* to = turned + row / kRows * kRows * size + row % kRows;
    for (size_t i = 0; i < size; i++) to[i * kRows] = from[i];
  }
}

// Of the positions [position, position + n), those that token t sees: [from, to), as offsets.
template <class S>
struct Seen {
  size_t from, to;

  Seen(const QueryBlock& queries, size_t t, size_t position, size_t n) {
    const size_t end = queries.end + t;
    const auto offset = [=](size_t at) {
      return at <= position ? 0 : at - position < n ? at - position : n;
    };
    from = offset(end > queries.window ? end - queries.window : 0);
    to = offset(end);
  }
};

// What a group of rows has found so far.
struct FoundRows {
  float* top;
  float* total;
  float* out;
  size_t first, n;  // rows of the block
};

// One tile of n positions for one group of rows, whose queries are in turned.
template <class S>
void attend_tile(const QueryBlock& queries, const float* turned, const float* keys,
                 const CachedRows<float>& values, size_t position, size_t n, float* scores,
                 const FoundRows& found) {
  constexpr size_t kRows = 2 * S::kLanes;
  const size_t size = values.size;
  in_steps<S::kSums / 2>(0, n, [&]<size_t kPositions>(size_t p) {
    score_block<S, kPositions>(turned, keys + p * size, size, scores + p * kRows);
  });
  if (queries.cap > 0) cap_each<S>(scores, n * kRows, queries.cap);
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  for (size_t row = 0; row < found.n; row++) {
    const Seen<S> seen(queries, (found.first + row) / queries.n_queries, position, n);
    for (size_t p = 0; p < seen.from; p++) scores[p * kRows + row] = kUnseen;
    for (size_t p = seen.to; p < n; p++) scores[p * kRows + row] = kUnseen;
  }
  float top[kRows] = {}, total[kRows] = {}, factors[kRows];
  std::memcpy(top, found.top, found.n * sizeof *top);
  std::memcpy(total, found.total, found.n * sizeof *total);
  const bool changed = weigh_block<S>(scores, n, top, total, factors);
  std::memcpy(found.top, top, found.n * sizeof *top);
  std::memcpy(found.total, total, found.n * sizeof *total);
  if (changed) scale_rows<S>(found.out, size, found.n, factors);
  in_steps<kQueriesAtOnce>(0, found.n, [&]<size_t kSome>(size_t row) {
    add_heads<S, kSome>({scores + row, 1, kRows}, values, 0, n, found.out + row * size, false);
  });
}

template <class S, class Stored>
void attend_block_rows(const QueryBlock& queries, const CachedRows<Stored>& keys,
                       const CachedRows<Stored>& values, size_t first, size_t last, float* top,
                       float* total, float* out, float* scratch) {
  constexpr size_t kRows = 2 * S::kLanes;
  static_assert(kRows <= kBlockRows);
  const size_t size = keys.size, n_rows = queries.n_tokens * queries.n_queries;
  float* key_tile = scratch;
  float* value_tile = key_tile + kBlockPositions * size;
  float* scores = value_tile + kBlockPositions * size;
  float* turned = scores + kBlockPositions * kRows;
  const CachedRows<float> tile{reinterpret_cast<const uint8_t*>(value_tile), size * sizeof(float),
                               size};
  turn_queries<S>(queries, size, turned);
  for (size_t at = first; at < last; at += kBlockPositions) {
    const size_t n = last - at < kBlockPositions ? last - at : kBlockPositions;
    if (Seen<S>(queries, queries.n_tokens - 1, at, n).to == 0) return;
    if (Seen<S>(queries, 0, at, n).from == n) continue;
    widen_rows<S>(keys, at - first, n, key_tile);
    widen_rows<S>(values, at - first, n, value_tile);
    for (size_t row = 0; row < n_rows; row += kRows) {
      attend_tile<S>(queries, turned + row * size, key_tile, tile, at, n, scores,
                     {top + row, total + row, out + row * size, row,
                      n_rows - row < kRows ? n_rows - row : kRows});
    }
  }
}

template <class S>
void attend_block(KvFormat format, const QueryBlock& view, const uint8_t* keys,
                  const uint8_t* values, size_t stride, size_t size, size_t first, size_t last,
                  float* top, float* total, float* out, float* scratch) {
  const auto attend = [&]<class Stored>(Stored) {
    attend_block_rows<S>(view, CachedRows<Stored>{keys, stride, size},
                         CachedRows<Stored>{values, stride, size}, first, last, top, total, out,
                         scratch);
  };
  if (format == KvFormat::kFloat32) attend(float{});
  if (format == KvFormat::kFloat16) attend(uint16_t{});
  if (format == KvFormat::kInt8) attend(int8_t{});
}

}  // namespace lowmoe::vector
