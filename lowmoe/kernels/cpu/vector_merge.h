// Puts together what attend_part found in several ranges of positions. Compiled for every processor
// alike, so that the result is a function of the parts only.
#pragma once

#include <cmath>
#include <cstddef>

namespace lowmoe {

// Parts of the attention of some rows, a row being one query head of one token:
//   top, total   [n_parts][stride]         of the first row wanted
//   out          [n_parts][stride][size]
struct AttentionParts {
  const float* top;
  const float* total;
  const float* out;
  size_t stride;  // rows from a part to the next
};

// y = sum over parts of out * w  /  sum over parts of total * w,   w = exp(top - greatest top),
// adding from the first part to the last.
//   y   [n_rows][size]
// A part of an empty range counts nothing; at least one part of each row must not be empty. NaN in
// a row's top, total or out gives NaN in its y.
inline void merge_attention(const AttentionParts& parts, size_t n_parts, size_t n_rows, size_t size,
                            float* y) {
  for (size_t row = 0; row < n_rows; row++, y += size) {
    float top = parts.top[row];
    for (size_t p = 1; p < n_parts; p++) {
      const float other = parts.top[p * parts.stride + row];
      if (other > top) top = other;
    }
    float total = 0;
    for (size_t i = 0; i < size; i++) y[i] = 0;
    for (size_t p = 0; p < n_parts; p++) {
      const size_t part = p * parts.stride + row;
      if (parts.total[part] == 0) continue;
      const float weight = std::exp(parts.top[part] - top);
      const float* out = parts.out + part * size;
      total += weight * parts.total[part];
      for (size_t i = 0; i < size; i++) y[i] += weight * out[i];
    }
    for (size_t i = 0; i < size; i++) y[i] /= total;
  }
}

}  // namespace lowmoe
