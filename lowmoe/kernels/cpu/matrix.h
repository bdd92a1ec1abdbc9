// What kernels multiply: a matrix of trellis planes, and tokens rounded to int8.
//
// Pointers and sizes only; who owns the memory is not known here. The bits of a plane are drawn in
// quant/layout.py, those of rounded tokens in quant/activations.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "quant/layout.h"

namespace lowmoe {

inline constexpr int kTableSize = 64;
inline constexpr int kWindowBits = 6;      // a narrower code's table is repeated up to this width
inline constexpr int kTableOffset = 64;    // makes table values unsigned: dot products of u8 and s8
inline constexpr int kScaleColumns = 128;  // columns of a token that share one scale

// A trellis code, the same for every matrix of a model.
struct Code {
  alignas(64) uint8_t table[kTableSize];  // value of each window + kTableOffset, 1 to 127
  float scale_unit;                       // table_unit / 15
};

// W [n_out, n_in] as a stack of planes of W / d H.
struct TrellisMatrix {
  layout::PlaneLayout shape;
  const Code* code;
  const uint8_t* planes[layout::kMaxPlanes];  // each aligned to 64 bytes
  int n_planes;

  const uint8_t* codes(int plane, size_t row_block) const {
    return planes[plane] + row_block * shape.column_blocks() * layout::kBlockCodeBytes;
  }
  // Byte b of a column block's 32: row b in the low nibble, row 32 + b in the high one.
  const uint8_t* group_scales(int plane, size_t row_block) const {
    return planes[plane] + shape.group_scale_offset() +
           row_block * shape.column_blocks() * layout::kBlockScaleBytes;
  }
  // 64 float16.
  const uint8_t* row_scales(int plane, size_t row_block) const {
    return planes[plane] + shape.row_scale_offset() + row_block * layout::kBlockRows * 2;
  }
  // What the sum over planes is multiplied by.
  float gain() const {
    float value;
    std::memcpy(&value, planes[n_planes - 1] + shape.gain_offset(), sizeof value);
    return value;
  }
};

constexpr size_t padded_columns(size_t n_in) {
  return layout::round_up(n_in, layout::kBlockColumns);
}
constexpr size_t scale_groups(size_t n_in) {
  return layout::round_up(n_in, kScaleColumns) / kScaleColumns;
}

// Tokens x' = H (d * x), rounded: x' is about codes * scales.
//   codes   [T][padded columns]   0 beyond n_in
//   scales  [T][scale_groups]     one for each 128 columns; the last group may be short
//   sums    [T][column blocks]    of the codes of each 64 columns
struct RoundedTokens {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  size_t n_in;

  RoundedTokens from(size_t token) const {
    return {codes + token * padded_columns(n_in), scales + token * scale_groups(n_in),
            sums + token * (padded_columns(n_in) / layout::kBlockColumns), n_in};
  }
};

}  // namespace lowmoe
