#include "lowmoe/kernels/cpu/encoder_fit.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "lowmoe/kernels/cpu/float16.h"

namespace lowmoe {

namespace {

constexpr float kLevels = layout::kScaleLevels;

// To the nearest, ties to even.  x >= 0 or NaN.
uint16_t to_float16(float x) {
  constexpr float kSmallestNormal = 0x1p-14f, kTooLarge = 65520;
  if (!(x < kTooLarge)) return 0x7c00;
  // Adding a power of two whose last bit is float16's last at this size rounds to that bit.
  const uint32_t exponent = std::bit_cast<uint32_t>(std::max(x, kSmallestNormal)) & 0x7f800000;
  const float unit = std::bit_cast<float>(exponent + (13u << 23));
  const float rounded = (x + unit) - unit;
  if (rounded < kSmallestNormal) return static_cast<uint16_t>(rounded * 0x1p24f);
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(rounded) - (112u << 23)) >> 13);
}

// To the nearest, ties to even.  |x| < 2^22.
float round_to_integer(float x) {
  constexpr float kUnits = 0x1.8p23f;
  return (x + kUnits) - kUnits;
}

bool set_rows(const float* rows, FittedScales* fit) {
  bool fine = true;
  for (int r = 0; r < 64; r++) {
    fit->half[r] = to_float16(rows[r]);
    fit->row[r] = from_float16(fit->half[r]);
    fine = fine && fit->half[r] < 0x7c00;
  }
  return fine;
}

}  // namespace

void FittedScales::of_group(size_t group, float unit, BlockScales* scales) const {
  for (int r = 0; r < 64; r++) {
    const float scale = row[r] * static_cast<float>(nibble[group][r]) / kLevels * unit;
    scales->scale[r] = scale;
    scales->inverse[r] = scale > 0 ? 1 / scale : 0;
    scales->square[r] = scale * scale;
    scales->least[r] = scale > 0 ? kLeastWeight : 0;
  }
  for (int w = 0; w < layout::kWords; w++) {
    float loudest = 0;
    for (int j = 0; j < kRowsOfWord; j++) loudest = std::max(loudest, scales->square[8 * j + w]);
    scales->loudest[w] = loudest;
  }
}

bool fit_nearest(const float (*wanted)[64], size_t n_groups, FittedScales* fit) {
  // As bits, numbers that are not negative have the same order, and a NaN is above them all.
  uint32_t most[64] = {};
  for (size_t g = 0; g < n_groups; g++) {
    for (int r = 0; r < 64; r++) most[r] = std::max(most[r], std::bit_cast<uint32_t>(wanted[g][r]));
  }
  float rows[64];
  for (int r = 0; r < 64; r++) rows[r] = std::bit_cast<float>(most[r]);
  if (!set_rows(rows, fit)) return false;
  for (size_t g = 0; g < n_groups; g++) {
    for (int r = 0; r < 64; r++) {
      const float step = fit->row[r] / kLevels;
      const float nearest = round_to_integer(std::min(wanted[g][r] / step, kLevels));
      // A group far below its row's loudest still gets the smallest step; only silence gets 0.
      const float heard = step > 0 ? std::max(nearest, 1.0f) : 1.0f;
      fit->nibble[g][r] = static_cast<uint8_t>(wanted[g][r] > 0 ? heard : 0);
    }
  }
  return true;
}

bool fit_least_squares(float (*products)[64], const float (*energies)[64], size_t n_groups,
                       float unit, FittedScales* fit) {
  float (*ideal)[64] = products;
  for (size_t g = 0; g < n_groups; g++) {
    for (int r = 0; r < 64; r++) {
      const float quotient = products[g][r] / (energies[g][r] * unit);
      ideal[g][r] = energies[g][r] > 0 && products[g][r] > 0 ? quotient : 0;
    }
  }
  if (!fit_nearest(ideal, n_groups, fit)) return false;
  // With the nibbles fixed, the best row scale is one more least-squares fit.
  float sum[64] = {}, weight[64] = {};
  for (size_t g = 0; g < n_groups; g++) {
    for (int r = 0; r < 64; r++) {
      const float nibble = fit->nibble[g][r], loud = nibble * energies[g][r];
      sum[r] += loud * ideal[g][r];
      weight[r] += nibble * loud;
    }
  }
  for (int r = 0; r < 64; r++) sum[r] = weight[r] > 0 ? sum[r] / weight[r] * kLevels : 0;
  return set_rows(sum, fit);
}

void store_scales(const FittedScales& fit, const layout::PlaneLayout& shape, size_t row_block,
                  uint8_t* plane) {
  uint16_t in_order[64];
  for (int row = 0; row < 64; row++) in_order[row] = fit.half[slot_of_row(row)];
  std::memcpy(plane + shape.row_scale_offset() + row_block * sizeof in_order, in_order,
              sizeof in_order);
  const size_t n_groups = shape.column_blocks();
  uint8_t* bytes =
      plane + shape.group_scale_offset() + row_block * n_groups * layout::kBlockScaleBytes;
  for (size_t g = 0; g < n_groups; g++) {
    for (int b = 0; b < layout::kBlockScaleBytes; b++) {
      const int low = fit.nibble[g][slot_of_row(b)], high = fit.nibble[g][slot_of_row(32 + b)];
      *bytes++ = static_cast<uint8_t>(low | high << 4);
    }
  }
}

}  // namespace lowmoe
