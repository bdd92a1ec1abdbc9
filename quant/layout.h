// Every bit of a trellis plane; the drawing and the words are in layout.py beside this file.
// tests/quant/test_layout.py pins the two together.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowmoe::layout {

inline constexpr int kBlockRows = 64;
inline constexpr int kBlockColumns = 64;
inline constexpr int kSliceColumns = 4;
inline constexpr int kSlices = kBlockColumns / kSliceColumns;
inline constexpr int kWords = 8;
inline constexpr int kWordWeights = 32;
inline constexpr int kSymbolBits = 2;
inline constexpr int kScaleLevels = 15;
inline constexpr int kRegionAlignment = 64;
inline constexpr int kMaxPlanes = 3;
inline constexpr int kBlockCodeBytes = kBlockRows * kBlockColumns * kSymbolBits / 8;
inline constexpr int kBlockScaleBytes = kBlockRows / 2;

// Row of the block's 64 that weight i of word w codes.
constexpr int word_row(int w, int i) { return 16 * (i / 8) + 2 * w + (i / 4) % 2; }

// Column of the slice's 4 that weight i of a word codes.
constexpr int word_column(int i) { return i % 4; }

// The window of weight i: window_bits bits from bit 2 * i upwards, wrapping around.
constexpr uint32_t window(uint64_t word, int i, int window_bits) {
  const int shift = kSymbolBits * i;
  const uint64_t turned = shift == 0 ? word : (word >> shift) | (word << (64 - shift));
  return static_cast<uint32_t>(turned & ((uint64_t{1} << window_bits) - 1));
}

constexpr size_t round_up(size_t count, size_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Sizes and offsets, in bytes, of one plane of a matrix with n_out rows and n_in columns.
struct PlaneLayout {
  size_t n_out;
  size_t n_in;

  constexpr size_t row_blocks() const { return round_up(n_out, kBlockRows) / kBlockRows; }
  constexpr size_t column_blocks() const { return round_up(n_in, kBlockColumns) / kBlockColumns; }
  constexpr size_t code_bytes() const { return row_blocks() * column_blocks() * kBlockCodeBytes; }
  constexpr size_t group_scale_offset() const { return code_bytes(); }
  constexpr size_t row_scale_offset() const {
    return code_bytes() +
           round_up(row_blocks() * column_blocks() * kBlockScaleBytes, kRegionAlignment);
  }
  constexpr size_t gain_offset() const {
    return row_scale_offset() + row_blocks() * kBlockRows * 2;
  }
  constexpr size_t plane_bytes() const { return gain_offset() + kRegionAlignment; }
};

}  // namespace lowmoe::layout
