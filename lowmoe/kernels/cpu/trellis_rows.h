// What every instruction set does with the rows of a block, once for all its columns.
#pragma once

#include <cstring>

#include "lowmoe/kernels/cpu/float16.h"
#include "lowmoe/kernels/cpu/matrix.h"

namespace lowmoe {

inline constexpr int kHalves = kScaleColumns / layout::kBlockColumns;  // of a group of 128 columns

// Compiled once for each instruction set, so it must not be shared by linking.
namespace {

using RowScales = float[layout::kMaxPlanes][layout::kBlockRows];

inline void read_row_scales(const TrellisMatrix& w, size_t row_block, RowScales& scales) {
  for (int p = 0; p < w.n_planes; p++) {
    uint16_t halves[layout::kBlockRows];
    std::memcpy(halves, w.row_scales(p, row_block), sizeof halves);
    for (int r = 0; r < layout::kBlockRows; r++) scales[p][r] = from_float16(halves[r]);
  }
}

// y of dot_block from its planes' sums over groups.
inline void finish_rows(const TrellisMatrix& w, size_t row_block,
                        const float (&sums)[layout::kMaxPlanes][layout::kBlockRows], float* y) {
  RowScales row_scales;
  read_row_scales(w, row_block, row_scales);
  const float unit = w.code->scale_unit * w.gain();
  for (int r = 0; r < layout::kBlockRows; r++) {
    y[r] = 0;
    for (int p = 0; p < w.n_planes; p++) y[r] += sums[p][r] * (row_scales[p][r] * unit);
  }
}

}  // namespace

}  // namespace lowmoe
