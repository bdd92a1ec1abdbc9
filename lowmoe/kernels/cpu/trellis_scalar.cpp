// The kernels in plain C++: what the others are held to, and what runs where no other does.
#include <cmath>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/trellis_tile.h"

namespace lowmoe {

namespace {

constexpr int kRows = layout::kBlockRows, kSliceBytes = layout::kWords * 8;

// The table values of one slice, [64 rows][4 columns], kTableOffset still added.
void look_up(const uint8_t* slice, const uint8_t* table, uint8_t (*values)[layout::kSliceColumns]) {
  for (int w = 0; w < layout::kWords; w++) {
    uint64_t word = 0;
    for (int b = 0; b < 8; b++) word |= uint64_t{slice[8 * w + b]} << 8 * b;
    for (int i = 0; i < layout::kWordWeights; i++) {
      values[layout::word_row(w, i)][layout::word_column(i)] =
          table[layout::window(word, i, kWindowBits)];
    }
  }
}

// Adds a column block's products to T, see isa.h.
void add_block(const uint8_t* codes, const uint8_t* table, const uint8_t* nibbles, const int8_t* x,
               int32_t x_sum, int32_t* t) {
  int32_t sums[kRows];
  for (int r = 0; r < kRows; r++) sums[r] = -kTableOffset * x_sum;
  for (int s = 0; s < layout::kSlices; s++, codes += kSliceBytes, x += layout::kSliceColumns) {
    uint8_t values[kRows][layout::kSliceColumns];
    look_up(codes, table, values);
    for (int r = 0; r < kRows; r++) {
      for (int c = 0; c < layout::kSliceColumns; c++) sums[r] += values[r][c] * x[c];
    }
  }
  for (int r = 0; r < kRows / 2; r++) {
    t[r] += (nibbles[r] & 15) * sums[r];
    t[kRows / 2 + r] += (nibbles[r] >> 4) * sums[kRows / 2 + r];
  }
}

void dot_block(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x, float* y) {
  const size_t n_blocks = w.shape.column_blocks();
  float sums[layout::kMaxPlanes][kRows] = {};
  for (int p = 0; p < w.n_planes; p++) {
    for (size_t begin = 0; begin < n_blocks; begin += kHalves) {
      int32_t t[kRows] = {};
      for (size_t b = begin; b < std::min(begin + kHalves, n_blocks); b++) {
        add_block(w.codes(p, row_block) + b * layout::kBlockCodeBytes, w.code->table,
                  w.group_scales(p, row_block) + b * layout::kBlockScaleBytes,
                  x.codes + b * layout::kBlockColumns, x.sums[b], t);
      }
      const float x_scale = x.scales[begin / kHalves];
      for (int r = 0; r < kRows; r++) {
        sums[p][r] = std::fma(static_cast<float>(t[r]), x_scale, sums[p][r]);
      }
    }
  }
  finish_rows(w, row_block, sums, y);
}

struct Scalar {
  static constexpr size_t kMostTokens = 1;

  template <int kPlanes>
  static void fill(const TrellisMatrix& w, size_t row_block, size_t block,
                   const uint8_t (&shares)[layout::kMaxPlanes][kRows],
                   uint8_t (*codes)[kRows][layout::kSliceColumns]) {
    for (int s = 0; s < layout::kSlices; s++) {
      int32_t sums[kRows][layout::kSliceColumns] = {};
      for (int p = 0; p < kPlanes; p++) {
        uint8_t values[kRows][layout::kSliceColumns];
        look_up(w.codes(p, row_block) + block * layout::kBlockCodeBytes + s * kSliceBytes,
                w.code->table, values);
        for (int r = 0; r < kRows; r++) {
          for (int c = 0; c < layout::kSliceColumns; c++) {
            sums[r][c] += shares[p][r] * (values[r][c] - kTableOffset);
          }
        }
      }
      for (int r = 0; r < kRows; r++) {
        for (int c = 0; c < layout::kSliceColumns; c++) {
          codes[s][r][c] = static_cast<uint8_t>(
              ((sums[r][c] + (1 << (kShareBits - 1))) >> kShareBits) + kTileOffset);
        }
      }
    }
  }

  template <int kTokens>
  static void add(const Tile& tile, int n_slices, const RoundedTokens& x, size_t g, float* y,
                  size_t) {
    const int8_t* codes = x.codes + g * kScaleColumns;
    for (int r = 0; r < kRows; r++) {
      int32_t sum = 0;
      for (int s = 0; s < n_slices; s++) {
        for (int c = 0; c < layout::kSliceColumns; c++) {
          sum += (tile.codes[s][r][c] - kTileOffset) * codes[s * layout::kSliceColumns + c];
        }
      }
      y[r] = std::fma(static_cast<float>(sum) * x.scales[g], tile.scales[r], y[r]);
    }
  }
};

}  // namespace

extern const TrellisKernels kTrellisScalar;
const TrellisKernels kTrellisScalar{dot_block, multiply_block<Scalar>};

}  // namespace lowmoe
