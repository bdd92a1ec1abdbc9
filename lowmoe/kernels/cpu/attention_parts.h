// Softmax over positions in parts: each part keeps its largest score, and sums of powers beside it.
// Source: arXiv 1805.02867 (online normaliser).
#pragma once

#include <cmath>
#include <cstddef>

namespace lowmoe {

// (top, total, out) of the positions of both parts.  out: [size], as attend_part leaves it.
inline void merge_part(float top, float total, const float* out, size_t size, float& to_top,
                       float& to_total, float* to_out) {
  const float higher = top > to_top ? top : to_top;
  const float old_scale = std::exp(to_top - higher), new_scale = std::exp(top - higher);
  to_top = higher;
  to_total = to_total * old_scale + total * new_scale;
  for (size_t i = 0; i < size; i++) to_out[i] = to_out[i] * old_scale + out[i] * new_scale;
}

}  // namespace lowmoe
