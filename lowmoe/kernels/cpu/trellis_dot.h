// A row block times few tokens, straight from the bits: isa.h's dot_block, which an instruction set
// completes with products of one column block.
//
// Decoded values never leave registers, so a second token costs no second decoding. Columns
// outside, planes inside: a plane's codes are then one stream over all row blocks, without a jump
// that nothing could foresee.
#pragma once

#include <algorithm>
#include <cmath>

#include "lowmoe/kernels/cpu/matrix.h"

namespace lowmoe {

inline constexpr int kHalves = kScaleColumns / layout::kBlockColumns;  // of a group of 128 columns

// Compiled once for each instruction set, so it must not be shared by linking.
namespace {

using RowScales = float[layout::kMaxPlanes][layout::kBlockRows];
using RowSums = int32_t[layout::kBlockRows];

template <class Set>
void read_row_scales(const TrellisMatrix& w, size_t row_block, RowScales& scales) {
  for (int p = 0; p < w.n_planes; p++) Set::widen(w.row_scales(p, row_block), scales[p]);
}

// What an instruction set brings:
//   Table(code)    the table as its look-ups want it
//   widen(halves, floats)
//                  64 float16, aligned to 64 bytes, to float32
//   kMostDots      tokens whose sums its registers hold beside the look-ups
//   add_block<n_tokens>(codes, table, nibbles, x, block, t)
//                  adds a column block's nibble * table value * code to t[token][row], for the
//                  tokens at x; t is aligned to 64 bytes
template <class Set, int kTokens>
void dot_tokens(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x, float* y,
                size_t y_stride) {
  constexpr int kRows = layout::kBlockRows;
  const typename Set::Table table(*w.code);
  const size_t n_blocks = w.shape.column_blocks(), n_groups = scale_groups(x.n_in);
  alignas(64) float sums[layout::kMaxPlanes][kTokens][kRows] = {};
  for (size_t g = 0; g < n_groups; g++) {
    for (int p = 0; p < w.n_planes; p++) {
      alignas(64) RowSums t[kTokens] = {};
      for (size_t b = g * kHalves; b < std::min((g + 1) * kHalves, n_blocks); b++) {
        Set::template add_block<kTokens>(
            w.codes(p, row_block) + b * layout::kBlockCodeBytes, table,
            w.group_scales(p, row_block) + b * layout::kBlockScaleBytes, x, b, t);
      }
      for (int i = 0; i < kTokens; i++) {
        const float x_scale = x.scales[i * n_groups + g];
        for (int r = 0; r < kRows; r++) {
          sums[p][i][r] = std::fma(static_cast<float>(t[i][r]), x_scale, sums[p][i][r]);
        }
      }
    }
  }
  alignas(64) RowScales row_scales;
  read_row_scales<Set>(w, row_block, row_scales);
  const float unit = w.code->scale_unit * w.gain();
  for (int i = 0; i < kTokens; i++) {
    float* rows = y + i * y_stride;
    for (int r = 0; r < kRows; r++) rows[r] = 0;
    for (int p = 0; p < w.n_planes; p++) {
      for (int r = 0; r < kRows; r++) rows[r] += sums[p][i][r] * (row_scales[p][r] * unit);
    }
  }
}

template <class Set>
void dot_block(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x, float* y) {
  dot_tokens<Set, 1>(w, row_block, x, y, 0);
}

// dot_tokens for 1 to kMost tokens.
template <class Set, int kMost = Set::kMostDots>
void dot_few(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x, size_t n_tokens,
             float* y, size_t y_stride) {
  if (n_tokens == kMost) return dot_tokens<Set, kMost>(w, row_block, x, y, y_stride);
  if constexpr (kMost > 1) dot_few<Set, kMost - 1>(w, row_block, x, n_tokens, y, y_stride);
}

// Calls work(first token, count) for parts of like size, of `most` tokens at most: 7 are 4 and 3,
// for few tokens leave a processor waiting for its own sums.
template <class Work>
void each_part(size_t n_tokens, size_t most, Work work) {
  for (size_t first = 0; first < n_tokens;) {
    const size_t left = n_tokens - first, parts = (left + most - 1) / most;
    const size_t count = (left + parts - 1) / parts;
    work(first, count);
    first += count;
  }
}

}  // namespace

}  // namespace lowmoe
