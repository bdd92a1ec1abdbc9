// The kernels in plain C++: what the others are held to, and what runs where no other does.
#include <cmath>
#include <cstring>

#include "lowmoe/kernels/cpu/float16.h"
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

struct Scalar {
  struct Table {
    const uint8_t* values;
    explicit Table(const Code& code) : values(code.table) {}
  };
  static constexpr size_t kMostDots = 1;

  static void widen(const uint8_t* halves, float* floats) {
    for (int r = 0; r < kRows; r++) {
      uint16_t half;
      std::memcpy(&half, halves + 2 * r, sizeof half);
      floats[r] = from_float16(half);
    }
  }

  template <int kTokens>
  static void add_block(const uint8_t* codes, const Table& table, const uint8_t* nibbles,
                        const RoundedTokens& x, size_t block, RowSums* t) {
    static_assert(kTokens == 1);
    const int8_t* columns = x.codes + block * layout::kBlockColumns;
    RowSums sums;
    for (int r = 0; r < kRows; r++) sums[r] = -kTableOffset * x.sums[block];
    for (int s = 0; s < layout::kSlices; s++) {
      uint8_t values[kRows][layout::kSliceColumns];
      look_up(codes + s * kSliceBytes, table.values, values);
      for (int r = 0; r < kRows; r++) {
        for (int c = 0; c < layout::kSliceColumns; c++) {
          sums[r] += values[r][c] * columns[s * layout::kSliceColumns + c];
        }
      }
    }
    for (int r = 0; r < kRows / 2; r++) {
      t[0][r] += (nibbles[r] & 15) * sums[r];
      t[0][kRows / 2 + r] += (nibbles[r] >> 4) * sums[kRows / 2 + r];
    }
  }

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
const TrellisKernels kTrellisScalar{dot_block<Scalar>, multiply_block<Scalar>};

}  // namespace lowmoe
