// AVX-VNNI: the look-ups of AVX2, vpdpbusd for the products.
#include "lowmoe/kernels/cpu/trellis_avx2.h"

namespace lowmoe {

namespace {

struct AvxVnni : Tiles256 {
  static constexpr size_t kMostTokens = 6;  // 12 sums, 2 registers of codes, 1 of a token
  static constexpr int kRegisters = 2;      // of rows at a time

  // As asm for the reason that trellis_avx512.cpp has.
  static void add_products(__m256i& sums, __m256i values, __m256i columns) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(values), "x"(columns));
  }

  template <int kTokens>
  static void add(const Tile& tile, int n_slices, const RoundedTokens& x, size_t g, float* y,
                  size_t y_stride) {
    const int8_t* columns[kTokens];
    int32_t starts[kTokens];
    for (int t = 0; t < kTokens; t++) {
      const RoundedTokens token = x.from(t);
      columns[t] = token.codes + g * kScaleColumns;
      starts[t] = -kTileOffset * sum_of_group(token, g, n_slices);
    }
    constexpr int kSums =
        kTokens * kRegisters;  // one loop, always written out: see trellis_avx512.cpp
    for (int row = 0; row < kRows; row += kRegisters * kLanes) {
      __m256i sums[kSums];
#pragma GCC unroll 32
      for (int i = 0; i < kSums; i++) sums[i] = _mm256_set1_epi32(starts[i / kRegisters]);
      for (int s = 0; s < n_slices; s++) {
#pragma GCC unroll 32
        for (int i = 0; i < kSums; i++) {
          add_products(sums[i],
                       _mm256_load_si256(wide(tile.codes[s][row + i % kRegisters * kLanes])),
                       four_columns(columns[i / kRegisters] + s * layout::kSliceColumns));
        }
      }
#pragma GCC unroll 32
      for (int i = 0; i < kSums; i++) {
        const int t = i / kRegisters, first = row + i % kRegisters * kLanes;
        add_scaled(sums[i], x.from(t).scales[g], tile.scales + first, y + t * y_stride + first);
      }
    }
  }
};

}  // namespace

extern const TrellisKernels kTrellisAvxVnni;
const TrellisKernels kTrellisAvxVnni{dot_block<AvxVnni>, multiply_block<AvxVnni>};

}  // namespace lowmoe
