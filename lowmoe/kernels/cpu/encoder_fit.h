// Scales in the form that a plane can hold, for the 64 rows of a block: quant/encode.py's ScaleFit.
//
// Rows are in slots, an order in which the rows that words share lie together (encoder_search.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowmoe/kernels/cpu/encoder.h"
#include "lowmoe/kernels/cpu/encoder_search.h"

namespace lowmoe {

// Row 16 q + 2 w + p of a block is word w's: its slot is 16 q + 8 p + w.
constexpr int slot_of_row(int row) { return (row & ~15) | (row & 1) << 3 | (row & 15) >> 1; }

// Scales of 64 rows: row scale * nibble / 15 each.
struct FittedScales {
  uint16_t half[64];      // row scales as float16
  float row[64];          // and as they are read back
  uint8_t (*nibble)[64];  // [n_groups][64], lent

  // In table units, and everything that follows from them.
  void of_group(size_t group, float unit, BlockScales* scales) const;
};

// The nearest scales to `wanted` [n_groups][64] >= 0.  False: too large for float16, or not a
// number.
bool fit_nearest(const float (*wanted)[64], size_t n_groups, FittedScales* fit);

// The scales that bring table values closest to weights, by sums over each row's 64 columns of a
// group:
//   products  [n_groups][64]   weight * table value
//   energies  [n_groups][64]   table value^2
// Overwrites products.  False as above.
bool fit_least_squares(float (*products)[64], const float (*energies)[64], size_t n_groups,
                       float unit, FittedScales* fit);

// Writes the row scales and nibbles of a row block into a plane.
void store_scales(const FittedScales& fit, const layout::PlaneLayout& shape, size_t row_block,
                  uint8_t* plane);

}  // namespace lowmoe
