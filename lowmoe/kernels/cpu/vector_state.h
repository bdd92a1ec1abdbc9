// A head's state through one token, for any instruction set S of simd_*.h.
#pragma once

#include <cstddef>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/vector_math.h"

namespace lowmoe::vector {

// n_vectors * kLanes columns from `column` on, whose sums stay in registers; between the two times
// that they are gone through they stay in the nearest cache.
template <class S, size_t n_vectors, class Load, class Store>
void step_columns(const StateStep& s, float both, size_t column, const float* from, float* to,
                  float* out, const Load& load, const Store& store) {
  using Float = typename S::Float;
  Float known[n_vectors], read[n_vectors], added[n_vectors];
  for (size_t v = 0; v < n_vectors; v++) known[v] = read[v] = S::all(0.0f);
  for (size_t i = 0; i < s.n_rows; i++) {
    const Float key = S::all(s.key[i]), query = S::all(s.query[i]);
    for (size_t v = 0; v < n_vectors; v++) {
      const Float x = load(from + i * s.n_columns + column + v * S::kLanes);
      known[v] = S::fma(key, x, known[v]);
      read[v] = S::fma(query, x, read[v]);
    }
  }
  const Float remains = S::all(s.remains);
  for (size_t v = 0; v < n_vectors; v++) {
    const size_t at = column + v * S::kLanes;
    const Float value = load(s.value + at);
    const Float unknown = s.corrects ? value - remains * known[v] : value;
    added[v] = S::all(s.correction) * unknown;
    store(out + at, S::fma(remains, read[v], S::all(both) * added[v]));
  }
  for (size_t i = 0; i < s.n_rows; i++) {
    const Float key = S::all(s.key[i]);
    for (size_t v = 0; v < n_vectors; v++) {
      const size_t at = i * s.n_columns + column + v * S::kLanes;
      store(to + at, S::fma(key, added[v], remains * load(from + at)));
    }
  }
}

template <class S>
void step_state(const StateStep& s, const float* from, float* to, float* out) {
  constexpr size_t kVectors = 4;
  const auto load = [](const float* x) { return S::load(x); };
  const auto store = [](float* x, typename S::Float y) { S::store(x, y); };
  const float both = dot<S>(s.query, s.key, s.n_rows);
  size_t j = 0;
  for (; j + kVectors * S::kLanes <= s.n_columns; j += kVectors * S::kLanes) {
    step_columns<S, kVectors>(s, both, j, from, to, out, load, store);
  }
  for (; j + S::kLanes <= s.n_columns; j += S::kLanes) {
    step_columns<S, 1>(s, both, j, from, to, out, load, store);
  }
  const size_t rest = s.n_columns - j;
  if (rest == 0) return;
  step_columns<S, 1>(
      s, both, j, from, to, out, [=](const float* x) { return S::load_some(x, rest); },
      [=](float* x, typename S::Float y) { S::store_some(x, y, rest); });
}

}  // namespace lowmoe::vector
