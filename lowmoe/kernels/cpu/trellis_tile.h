// Prefill: a row block's weights of 128 columns as one tile of int8, decoded once for many tokens.
// Few tokens, up to 8, go without: see trellis_dot.h.
//
// The planes of a stack are added up before they meet tokens. With A[p][r][h] = row_scale * nibble
// of plane p, row r and 64-column half h, all float32, and v = the signed table value:
//
//   bound[r] = max over h of  A[0][r][h] + A[1][r][h] + ..
//   share[p][r][h] = round(A[p][r][h] * (255 / bound[r]))    to nearest even; their sum is <= 256
//   code[r][k] = (sum over p of  share[p][r][h(k)] * v[p][r][k]  + 64) >> 7    within +-126
//   weight[r][k] = code * scale[r],   scale[r] = bound[r] * (scale_unit * gain * (128 / 255))
//
// Every instruction set makes the same codes and scales, bit for bit; so are the sums of products,
// and of those, over groups g of 128 columns from first to last,
//   y[t][r] = fma(float(sum of code * x.codes[t]) * x.scales[t][g], scale[g][r], y[t][r])   from 0.
//
// What rounding adds to the error: half a scale for the code and 63 / 256 of one for each plane's
// share at most. On Gaussian weights coded with quant/trellis.py's table that is 2.8e-5, 7.2e-5 and
// 8.4e-5 of the weights' energy for 1, 2 and 3 planes, whose own errors are .077, .0060 and .00048;
// tests/kernels/test_trellis_kernels.py holds it there. Scales below 0 are not planned for: such
// rows come out wrong, but nothing else does.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/trellis_dot.h"

namespace lowmoe {

inline constexpr int kTileSlices = kScaleColumns / layout::kSliceColumns;
// Tokens up to which there is no tile: they are multiplied as dot_block does, exactly, so that one
// that is decoded beside others is rounded as if it were alone. With one plane a tile never pays
// for these; with two it takes 0.9 of the time of eight tokens, with three 0.8
// (benchmarks/kernel_speed.py). The same in every instruction set, so that all of them say the
// same.
inline constexpr size_t kFewTokens = 8;
inline constexpr int kShareSum = 255;
inline constexpr int kShareBits = 7;     // of a sum of shares * values that rounding drops
inline constexpr int kTileOffset = 128;  // makes codes unsigned: dot products of u8 and s8

struct alignas(64) Tile {
  // code + kTileOffset, slice by slice: the four columns of a row are neighbours.
  uint8_t codes[kTileSlices][layout::kBlockRows][layout::kSliceColumns];
  uint8_t shares[kHalves][layout::kMaxPlanes][layout::kBlockRows];
  float scales[layout::kBlockRows];
};
static_assert(sizeof(Tile) <= kTileScratchBytes);

// Compiled once for each instruction set, so it must not be shared by linking.
namespace {

// To nearest even: 2^23 + v has no bits left for a fraction. v in [0, 255].
inline uint8_t round_to_byte(float v) {
  return static_cast<uint8_t>(std::bit_cast<uint32_t>(v + 0x1p23f));
}

// Sets the shares and scales of the tile of group g, which has n_halves.
inline void share_scales(const TrellisMatrix& w, size_t row_block, size_t g, int n_halves,
                         const RowScales& row_scales, Tile& tile) {
  constexpr int kRows = layout::kBlockRows;
  const float unit = w.code->scale_unit * w.gain() * (128.0f / kShareSum);
  float parts[kHalves][layout::kMaxPlanes][kRows], bound[kRows] = {}, factor[kRows];
  for (int h = 0; h < n_halves; h++) {
    float sum[kRows] = {};
    for (int p = 0; p < w.n_planes; p++) {
      const uint8_t* nibbles =
          w.group_scales(p, row_block) + (kHalves * g + h) * layout::kBlockScaleBytes;
      float* part = parts[h][p];
      for (int r = 0; r < kRows / 2; r++) {
        part[r] = static_cast<float>(nibbles[r] & 15);
        part[kRows / 2 + r] = static_cast<float>(nibbles[r] >> 4);
      }
      for (int r = 0; r < kRows; r++) part[r] *= row_scales[p][r];
      for (int r = 0; r < kRows; r++) sum[r] += part[r];
    }
    for (int r = 0; r < kRows; r++) bound[r] = sum[r] > bound[r] ? sum[r] : bound[r];
  }
  for (int r = 0; r < kRows; r++) {
    factor[r] = bound[r] > 0 ? kShareSum / bound[r] : 0;
    tile.scales[r] = bound[r] * unit;
  }
  for (int h = 0; h < n_halves; h++) {
    for (int p = 0; p < w.n_planes; p++) {
      for (int r = 0; r < kRows; r++) {
        tile.shares[h][p][r] = round_to_byte(parts[h][p][r] * factor[r]);
      }
    }
  }
}

// Of a token's codes in the first n_slices of group g.
inline int32_t sum_of_group(const RoundedTokens& token, size_t g, int n_slices) {
  const int32_t* sums = token.sums + g * kHalves;
  return n_slices == kTileSlices ? sums[0] + sums[1] : sums[0];
}

// What an instruction set brings for multiply_block:
//   kMostTokens                       tokens whose sums its registers hold
//   fill<n_planes>(w, row_block, block, shares, codes)
//                                     writes the 16 slices of one column block
//   add<n_tokens>(tile, n_slices, x, g, y, y_stride)
//                                     adds the tile's products with the tokens at x to y
template <class Set>
void fill(const TrellisMatrix& w, size_t row_block, size_t block, int half, Tile& tile) {
  auto* codes = tile.codes + half * layout::kSlices;
  const auto& shares = tile.shares[half];
  switch (w.n_planes) {
    case 1:
      return Set::template fill<1>(w, row_block, block, shares, codes);
    case 2:
      return Set::template fill<2>(w, row_block, block, shares, codes);
    default:
      return Set::template fill<3>(w, row_block, block, shares, codes);
  }
}

template <class Set, int kTokens = Set::kMostTokens>
void add(const Tile& tile, int n_slices, const RoundedTokens& x, size_t n_tokens, size_t g,
         float* y, size_t y_stride) {
  if (n_tokens == kTokens) return Set::template add<kTokens>(tile, n_slices, x, g, y, y_stride);
  if constexpr (kTokens > 1) {
    add<Set, kTokens - 1>(tile, n_slices, x, n_tokens, g, y, y_stride);
  }
}

template <class Set>
void multiply_tiles(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x,
                    size_t n_tokens, float* y, size_t y_stride, uint8_t* scratch) {
  Tile& tile = *new (scratch) Tile;
  alignas(64) RowScales row_scales;
  read_row_scales<Set>(w, row_block, row_scales);
  for (size_t t = 0; t < n_tokens; t++) {
    std::memset(y + t * y_stride, 0, layout::kBlockRows * sizeof(float));
  }
  const size_t n_blocks = w.shape.column_blocks();
  for (size_t g = 0; g * kHalves < n_blocks; g++) {
    const int n_halves = static_cast<int>(std::min<size_t>(kHalves, n_blocks - g * kHalves));
    share_scales(w, row_block, g, n_halves, row_scales, tile);
    for (int h = 0; h < n_halves; h++) fill<Set>(w, row_block, g * kHalves + h, h, tile);
    each_part(n_tokens, Set::kMostTokens, [&](size_t first, size_t count) {
      add<Set>(tile, n_halves * layout::kSlices, x.from(first), count, g, y + first * y_stride,
               y_stride);
    });
  }
}

template <class Set>
void multiply_block(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x,
                    size_t n_tokens, float* y, size_t y_stride, uint8_t* scratch) {
  if (n_tokens > kFewTokens) {
    return multiply_tiles<Set>(w, row_block, x, n_tokens, y, y_stride, scratch);
  }
  each_part(n_tokens, Set::kMostDots, [&](size_t first, size_t count) {
    dot_few<Set>(w, row_block, x.from(first), count, y + first * y_stride, y_stride);
  });
}

}  // namespace

}  // namespace lowmoe
