// AVX-VNNI: the look-ups of AVX2, vpdpbusd for the products.
#include "lowmoe/kernels/cpu/trellis_avx2.h"

namespace lowmoe {

namespace {

struct Vnni {
  static constexpr size_t kMostDots = 4;

  // As asm for the reason that trellis_avx512.cpp has.
  static __m256i add(__m256i sums, __m256i values, __m256i columns) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(values), "x"(columns));
    return sums;
  }
};

struct AvxVnni : Dots256<Vnni>, Tiles256 {
  static constexpr size_t kMostTokens = 6;  // 12 sums, 2 registers of codes, 1 of a token
  static constexpr int kRegisters = 2;      // of rows at a time

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
    for (int row = 0; row < kRows; row += kRegisters * kLanes) {
      __m256i sums[kTokens][kRegisters];
      for (int t = 0; t < kTokens; t++) {
        for (auto& sum : sums[t]) sum = _mm256_set1_epi32(starts[t]);
      }
      for (int s = 0; s < n_slices; s++) {
        for (int t = 0; t < kTokens; t++) {
          const __m256i four = four_columns(columns[t] + s * layout::kSliceColumns);
          for (int i = 0; i < kRegisters; i++) {
            const __m256i codes = _mm256_load_si256(wide(tile.codes[s][row + i * kLanes]));
            sums[t][i] = Vnni::add(sums[t][i], codes, four);
          }
        }
      }
      for (int t = 0; t < kTokens; t++) {
        for (int i = 0; i < kRegisters; i++) {
          const int first = row + i * kLanes;
          add_scaled(sums[t][i], x.from(t).scales[g], tile.scales + first,
                     y + t * y_stride + first);
        }
      }
    }
  }
};

}  // namespace

extern const TrellisKernels kTrellisAvxVnni;
const TrellisKernels kTrellisAvxVnni{dot_block<AvxVnni>, multiply_block<AvxVnni>};

}  // namespace lowmoe
